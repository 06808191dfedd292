"""The run directory: what may change between starts, and metrics that survive a kill."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from tpu_tune import config as configuration
from tpu_tune.checkpoints.run_checkpoints import base_fingerprint
from tpu_tune.checkpoints.run_directory import MetricsFile, RunDirectory
from tpu_tune.errors import UserError
from tpu_tune.training import run_start


def make(tmp_path, **changes):
    config = configuration.from_dict({"output_dir": str(tmp_path / "run")})
    for key, value in changes.items():
        configuration.assign(config, key.replace("__", "."), value)
    return config


def test_first_start_writes_the_config_and_the_second_resumes(tmp_path):
    first = run_start.open_run(make(tmp_path))
    assert not first.resuming and first.notes == []
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded == configuration.to_dict(first.config)
    assert run_start.open_run(make(tmp_path)).resuming


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.logging_steps", 3),
        ("train.save_total_limit", 9),
        ("train.eval_steps", 7),
        ("mesh.fsdp", 4),
        ("train.report_to", ["wandb"]),
        ("data.num_workers", 2),
        ("train.per_device_eval_batch_size", 1),
    ],
)
def test_reporting_saving_and_mesh_may_change(tmp_path, key, value):
    run_start.open_run(make(tmp_path))
    start = run_start.open_run(make(tmp_path, **{key: value}))
    assert start.resuming and not start.notes
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert dict(configuration.flatten(recorded))[key] == value


def test_a_change_of_schedule_is_said_aloud(tmp_path):
    run_start.open_run(make(tmp_path, train__max_steps=30))
    (note,) = run_start.open_run(make(tmp_path, train__max_steps=60)).notes
    assert "train.max_steps was 30 and is now 60" in note


def test_any_other_difference_is_an_error_that_leaves_the_file_alone(tmp_path):
    run_start.open_run(make(tmp_path))
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match="lora.rank was 8 and is now 4; train.learning_rate was 5e-05 and is now 0.001"):
        run_start.open_run(make(tmp_path, train__learning_rate=1e-3, lora__rank=4))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_key_that_an_old_config_lacks_had_its_default(tmp_path):
    run_start.open_run(make(tmp_path))
    file = tmp_path / "run" / "config.json"
    old = json.loads(file.read_text())
    del old["train"]["optim"], old["mesh"]
    file.write_text(json.dumps(old))
    assert run_start.open_run(make(tmp_path)).resuming
    file.write_text(json.dumps(old))
    with pytest.raises(UserError, match='train.optim was "adamw" and is now "sgd"'):
        run_start.open_run(make(tmp_path, train__optim="sgd"))


def test_a_drawn_seed_is_recorded_and_kept(tmp_path):
    config = make(tmp_path, seed=-1)
    drawn = run_start.open_run(config).config.seed
    assert drawn >= 0 and config.seed == -1
    assert run_start.open_run(make(tmp_path, seed=-1)).config.seed == drawn


def test_looking_writes_nothing(tmp_path):
    run_start.open_run(make(tmp_path), write=False)
    assert not (tmp_path / "run").exists()


def test_places_that_cannot_be_used(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="run"):
        run_start.open_run(make(tmp_path))
    (tmp_path / "run").unlink()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no config.json"):
        run_start.open_run(make(tmp_path))
    (tmp_path / "run" / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match="cannot be read"):
        run_start.open_run(make(tmp_path))


def test_metrics_round_trip_and_truncation(tmp_path):
    assert RunDirectory(tmp_path).metrics() == [] and RunDirectory(tmp_path).truncate_metrics(3) == 0
    for step in range(1, 6):
        MetricsFile(RunDirectory(tmp_path)).append({"step": step, "loss": np.float32(0.5), "grad_norm": float("nan")})
    MetricsFile(RunDirectory(tmp_path)).append({"step": 4, "eval_loss": 1.0})
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.5, "grad_norm": None}
    file.write_text(file.read_text() + '{"step": 6, "lo')  # a kill in the middle of a line
    assert len(RunDirectory(tmp_path).metrics()) == 6
    assert RunDirectory(tmp_path).truncate_metrics(4) == 2
    assert file.read_text().splitlines() == lines[:4] + lines[5:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_an_int4_run_from_before_keeps_its_fifteen_levels(tmp_path):
    """Its config.json has no `quantize.symmetric`, and its checkpoints' fingerprint did not know the newer keys."""
    before = {"format": "int4", "group_size": 64, "double_quant": True, "include": ["all-linear"], "exclude": []}
    source = SimpleNamespace(fingerprint="weights")
    for format, symmetric in (("int4", True), ("nf4", False)):
        held = {**before, "format": format}
        (tmp_path / "config.json").write_text(json.dumps({"output_dir": str(tmp_path), "quantize": held}))
        config = RunDirectory(tmp_path).config()
        assert config.quantize.symmetric is symmetric and config.quantize.calibration == 0
        written = hashlib.sha256(json.dumps(["weights", dict(sorted(held.items())), "auto"]).encode()).hexdigest()
        assert base_fingerprint(source, config) == written
        config.quantize.symmetric = not symmetric
        assert (base_fingerprint(source, config) == written) is (format == "nf4")
    new = configuration.from_dict({"output_dir": str(tmp_path / "new"), "quantize": before})
    assert not new.quantize.symmetric
    (tmp_path / "config.json").write_text(json.dumps({"output_dir": str(tmp_path), "quantize": before}))
    new.output_dir = str(tmp_path)
    with pytest.raises(UserError, match="quantize.symmetric was true and is now false"):
        run_start.open_run(new, write=False)
