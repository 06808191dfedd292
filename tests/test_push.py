"""`tpu-tune push` against a hub that is not there: what would go up, what the card says and omits, what fails."""

import json
import pathlib
import re
import types

import huggingface_hub
import jax
import numpy as np
import pytest
from helpers_training import make_config, write_rows, write_tiny_llama
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

import tpu_tune
from tpu_tune import config as configuration
from tpu_tune.checkpoints import peft
from tpu_tune.checkpoints.params import open_architecture
from tpu_tune.checkpoints.run_directory import MetricsFile, RunDirectory
from tpu_tune.checkpoints.source import open_source
from tpu_tune.cli import main
from tpu_tune.inference import card, export, public_names
from tpu_tune.transforms import LoraConfig, find_targets, lora

TOKEN = "hf_" + "Zq7" * 11
SECRET = "alice-secret"  # a directory of the user's
IDS = np.random.default_rng(0).integers(0, 258, (1, 12))


def write_run(directory, config, metrics):
    """What a run leaves besides its result."""
    run = RunDirectory(directory)
    run.write_config(config)
    for row in metrics:
        MetricsFile(run).append(row)
    (directory / "curves.png").write_bytes(b"\x89PNG of the curves")
    return directory


def evaluation(step, loss):
    return {
        "step": step,
        "epoch": step / 4,
        "eval_loss": loss,
        "eval_perplexity": np.exp(loss),
        "eval_token_accuracy": 0.25,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's directory with a base model and rows."""
    home = tmp_path_factory.mktemp("home") / SECRET
    home.mkdir()
    write_tiny_llama(home / "models" / "tiny-base")
    write_rows(home / "chats.jsonl")
    return home


@pytest.fixture(scope="module")
def run(home):
    """A finished QLoRA run, its adapter random."""
    base, out = home / "models" / "tiny-base", home / "runs" / "chatty"
    config = make_config(
        output_dir=str(out),
        model__path=str(base),
        model__dtype="float32",
        data__train=str(home / "chats.jsonl"),
        data__chat_template=str(home / "my.jinja"),
        quantize__format="nf4",
        lora__rank=2,
        train__learning_rate=1e-2,
        data__cache_dir=str(home / "cache"),
        data__response_markers=f"{home}/x,### Answer:",
    )
    train = {"step": 8, "epoch": 2.0, "loss": 1.5, "learning_rate": 0.0, "num_tokens": 1234}
    write_run(out, config, [evaluation(4, 2.0), train, evaluation(8, 1.75)])
    source = open_source(str(base))
    arch = open_architecture(source)
    targets = find_targets(arch.modules(), LoraConfig(rank=2, alpha=16.0), arch.default_targets)
    random = np.random.default_rng(1)
    fresh = lora.init(targets, {}, jax.random.key(0))
    trained = {name: random.standard_normal(leaf.shape).astype(np.float32) / 4 for name, leaf in fresh.items()}
    peft.write_adapter(str(out / "adapter"), trained, targets, arch, str(base))
    return out


class Hub:
    """What the fake HfApi is asked to do, and the failure that it answers with."""

    def __init__(self):
        self.calls, self.files, self.failure, self.public, self.existing = [], {}, {}, True, []


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()

    class Api:
        def __init__(self, token=None):
            assert token == TOKEN

        def _called(self, name, *what):
            hub.calls.append((name, *what))
            if name in hub.failure:
                raise hub.failure[name]

        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            self._called("create_repo", repo_id, private, exist_ok)
            full = repo_id if "/" in repo_id else f"me/{repo_id}"
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{full}")

        def model_info(self, repo_id):
            return type("Info", (), {"private": not hub.public})

        def create_branch(self, repo_id, *, branch, exist_ok=False):
            self._called("create_branch", repo_id, branch, exist_ok)

        def create_commit(self, repo_id, operations, *, commit_message, revision=None):
            hub.existing = [str(path) for path in pathlib.Path(run_parent[0]).glob("tpu-tune-push-*")]
            self._called("create_commit", repo_id, commit_message, revision)
            for one in operations:
                with one.as_file() as stream:
                    hub.files[one.path_in_repo] = stream.read()
            return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}/commit/1"})

    run_parent = ["."]
    hub.watch = lambda directory: run_parent.__setitem__(0, directory)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("TMPDIR", raising=False)
    return hub


def push(capsys, *words, status=0):
    capsys.readouterr()
    assert main(["push", *map(str, words)]) == status
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    return captured.out if status == 0 else captured.err


def snapshot(directory):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


def card_of(hub, tmp_path):
    file = tmp_path / "README.md"
    file.write_bytes(hub.files["README.md"])
    return ModelCard.load(file)


def snippet(card, says):
    """The code below the line that begins with `says`."""
    return re.search(re.escape(says) + r"[^\n]*\n\n```\w+\n(.*?)\n```", card.text, re.DOTALL)[1]


def loaded(code):
    """The model that a snippet loads, run up to its last line, which prints an answer."""
    space = {}
    lines = code.splitlines()
    assert lines[-1].startswith("print(model.generate(")
    exec("\n".join(lines[:-1]), space)
    return space["model"]


def write_files(hub, directory):
    for name, content in hub.files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def test_the_dry_run_lists_what_the_push_uploads_and_neither_touches_the_run(capsys, run, hub):
    before = snapshot(run)
    facts = json.loads(push(capsys, run, "--repo", "me/chatty", "--dry-run", "--json"))
    text = push(capsys, run, "--repo", "me/chatty", "--dry-run")
    assert hub.calls == [] and "nothing was sent" in text and "\n  ---\n" in text
    sent = json.loads(push(capsys, run, "--repo", "me/chatty", "--message", f"mine {TOKEN}", "--json"))
    assert facts["files"] == sent["files"] == [{"name": name, "bytes": len(hub.files[name])} for name in hub.files]
    assert set(hub.files) == {"README.md", "curves.png", "adapter_config.json", "adapter_model.safetensors"}
    assert all(f"  {file['name']}" in text for file in facts["files"])
    assert facts["card"] == hub.files["README.md"].decode() and sent["commit"].endswith("/me/chatty/commit/1")
    assert hub.calls == [
        ("create_repo", "me/chatty", None, True),
        ("create_commit", "me/chatty", "mine ***", None),
    ]
    assert hub.files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert snapshot(run) == before


def test_nothing_that_goes_up_names_a_directory_of_the_users(capsys, run, home, hub, tmp_path):
    push(capsys, run, "--repo", "me/chatty")
    assert SECRET in (run / "adapter" / "adapter_config.json").read_text() + (run / "config.json").read_text()
    for name, content in hub.files.items():
        assert SECRET.encode() not in content and str(home).encode() not in content, name
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "tiny-base"
    text = card_of(hub, tmp_path).text
    assert "`tiny-base`" in text and "`chats.jsonl`" in text and "data.chat_template=my.jinja" in text
    assert 'data.response_markers=["x", "### Answer:"]' in text and "cache_dir" not in text and "runs" not in text


def test_the_card_of_an_adapter(capsys, run, hub, tmp_path):
    push(capsys, run, "--repo", "me/chatty", "--license", "apache-2.0", "--base-model", "acme/tiny")
    found = card_of(hub, tmp_path)
    data = found.data.to_dict()
    assert {
        key: data[key] for key in ("base_model", "base_model_relation", "library_name", "license", "pipeline_tag")
    } == {
        "base_model": "acme/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
    }
    assert data["tags"] == ["tpu_tune", "jax", "lora", "qlora"] and "datasets" not in data
    results = {result.metric_type: result.metric_value for result in found.data.eval_results}
    assert results == {"loss": 1.75, "perplexity": pytest.approx(np.exp(1.75), rel=1e-5), "accuracy": 0.25}
    assert {result.dataset_name for result in found.data.eval_results} == {"held-out rows of chats.jsonl"}
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "acme/tiny"
    for words in (
        "QLoRA of rank 2, alpha 16, over weights stored as nf4 (groups of 64, double quantized)",
        "](curves.png)",
        "5% of the rows, held out",
        "8 steps, 2.00 epochs, 1,234 tokens seen, last training loss 1.5000",
        "train.learning_rate=0.01\n",
        "| 4 | 1.00 | 2.0000 | 7.39 | 25.0% |",
        "| **8** | **2.00** | **1.7500** |",
    ):
        assert words in found.text, words
    settings = found.text[found.text.index("defaults:") :]
    assert "train.weight_decay" not in settings and "lora.alpha" not in settings  # at their defaults


def test_what_a_summary_adds_to_the_card(run, tmp_path, capsys, hub):
    counts = {"format": "messages", "used_examples": 853, "used_tokens": 51381, "used_target_tokens": 16324}
    (run / "summary.json").write_text(json.dumps({"data": {"train": counts}, "trainable_parameters": 4884480}))
    try:
        push(capsys, run, "--repo", "me/chatty", "--card-only")
    finally:
        (run / "summary.json").unlink()
    assert list(hub.files) == ["README.md", "curves.png"]
    text = card_of(hub, tmp_path).text
    assert "853 examples, 51,381 tokens, 16,324 of them targets" in text and "row format: messages" in text
    assert "4,884,480 parameters were trained" in text
    assert "apply_chat_template" in snippet(card_of(hub, tmp_path), "With transformers and PEFT:")


def test_the_snippets_of_an_adapter_run(capsys, run, home, hub, tmp_path, monkeypatch):
    push(capsys, run, "--repo", "me/chatty", "--revision", "v2")
    found, here = card_of(hub, tmp_path), write_files(hub, tmp_path / "down")
    assert ("create_branch", "me/chatty", "v2", True) in hub.calls and hub.calls[-1][-1] == "v2"

    def download(repo, revision=None):
        assert (repo, revision) == ("me/chatty", "v2")
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(home / "models")  # where the base is, as the snippet asks
    ours = {}
    exec(snippet(found, "With tpu_tune, as it was trained:"), ours)
    trained = tpu_tune.load(str(home / "models" / "tiny-base"), adapter=str(run / "adapter"), quantize="nf4")
    np.testing.assert_array_equal(ours["model"](IDS), trained(IDS))
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    theirs = {}
    exec(snippet(found, "With transformers and PEFT:"), theirs)
    plain = tpu_tune.load(str(home / "models" / "tiny-base"), adapter=str(run / "adapter"))
    with torch.no_grad():
        logits = theirs["model"](torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, plain(IDS), atol=1e-4 * np.abs(logits).max())


def test_a_merged_model(capsys, run, hub, tmp_path, monkeypatch):
    hub.watch(run.parent)
    before = snapshot(run.parent)
    facts = json.loads(push(capsys, run, "--repo", "me/chatty", "--merge", "--json"))
    assert len(hub.existing) == 1 and list(run.parent.iterdir()) == [run] and snapshot(run.parent) == before
    export.export_merged(str(run), str(tmp_path / "m"))
    ours, theirs = (
        load_file(write_files(hub, tmp_path / "down") / "model.safetensors"),
        load_file(tmp_path / "m" / "model.safetensors"),
    )
    assert set(hub.files) == {path.name for path in (tmp_path / "m").iterdir()} | {"README.md", "curves.png"}
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    found = card_of(hub, tmp_path)
    assert found.data.library_name == "transformers" and found.data.base_model is None
    assert f"{facts['relative_logit_difference']:.2%} of the largest" in found.text and "is merged into" in found.text
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo: str(tmp_path / "down"))
    model = loaded(snippet(found, "With tpu_tune:"))
    np.testing.assert_array_equal(model(IDS), tpu_tune.load(str(tmp_path / "m"))(IDS))
    compile(snippet(found, "With transformers:"), "card", "exec")


def test_a_gguf_file(capsys, run, hub, tmp_path, monkeypatch):
    listed = json.loads(push(capsys, run, "--repo", "chatty", "--gguf", "--gguf-type", "q8_0", "--dry-run", "--json"))
    assert list(run.parent.iterdir()) == [run]
    push(capsys, run, "--repo", "chatty", "--gguf", "--gguf-type", "q8_0")
    assert list(hub.files) == ["README.md", "curves.png", "chatty-q8_0.gguf"] == [f["name"] for f in listed["files"]]
    assert listed["files"][2]["bytes"] == len(hub.files["chatty-q8_0.gguf"])
    found, here = card_of(hub, tmp_path), write_files(hub, tmp_path / "down")
    assert "gguf" in found.data.tags and "hf download me/chatty chatty-q8_0.gguf" in snippet(found, "With llama.cpp:")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(here / file))
    assert loaded(snippet(found, "With tpu_tune:"))(IDS).shape == (1, 12, 264)


def test_a_run_that_trained_every_weight(capsys, home, hub, tmp_path):
    out = home / "full"
    config = make_config(
        output_dir=str(out), method="full", model__path=str(home / "models" / "tiny-base"), data__train="acme/chats"
    )
    write_run(out, config, [])
    assert "has no model/ yet" in push(capsys, out, "--repo", "me/full", status=1)
    write_tiny_llama(out / "model", 1)
    (out / "model" / "README.md").write_text("old")
    settings = json.loads((out / "model" / "config.json").read_text())
    (out / "model" / "config.json").write_text(
        json.dumps({**settings, "_name_or_path": str(home / "models" / "tiny-base")})
    )
    push(capsys, out, "--repo", "me/full")
    found = card_of(hub, tmp_path)
    assert found.data.datasets == ["acme/chats"] and found.data.library_name == "transformers"
    assert "full-fine-tuning" in found.data.tags and found.data.eval_results is None and "None was made" in found.text
    assert hub.files["model.safetensors"] == (out / "model" / "model.safetensors").read_bytes()
    assert json.loads(hub.files["config.json"]) == {**settings, "_name_or_path": "tiny-base"}


def test_a_base_and_data_of_the_hub(run, tmp_path):
    config = configuration.from_dict(json.loads((run / "config.json").read_text()))
    config.model.path, config.data.train = "HuggingFaceTB/SmolLM2-135M-Instruct", "acme/chats"
    base = public_names.base_of(config, str(run))
    assert (base.name, base.hub_id, base.kind) == ("HuggingFaceTB/SmolLM2-135M-Instruct",) * 2 + ("hub",)
    found = ModelCard(card.model_card(card.CardFacts("me/x", "adapter", config, str(run), base, [])))
    assert found.data.base_model == base.hub_id and found.data.datasets == ["acme/chats"]
    assert f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" in found.text


def test_a_local_base_whose_config_names_its_origin(run, tmp_path):
    config = configuration.from_dict(json.loads((run / "config.json").read_text()))
    config.model.path = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "acme/tiny"}))
    base = public_names.base_of(config, str(run))
    assert (base.name, base.hub_id, base.kind) == (tmp_path.name, "acme/tiny", "directory")
    found = ModelCard(card.model_card(card.CardFacts("me/x", "adapter", config, str(run), base, [])))
    assert found.data.base_model == "acme/tiny" and "whose config.json says that it is acme/tiny" in found.text


def test_many_evaluations_are_thinned_and_the_best_is_the_one_that_was_kept(run):
    config = configuration.from_dict(json.loads((run / "config.json").read_text()))
    config.train.load_best_model_at_end = True
    rows = [evaluation(step, 1 + abs(step - 33) / 100) for step in range(1, 101)]
    base = public_names.Base("b")
    text = card.model_card(
        card.CardFacts("me/x", "adapter", config, str(run), base, [*rows, {"step": 100, "eval_loss": None}])
    )
    table = [line for line in text.splitlines() if re.match(r"\| \**\d", line)]
    assert 20 <= len(table) <= 21 and table[0].startswith("| 1 |") and table[-1].startswith("| 100 |")
    assert [line for line in table if "**" in line] == ["| **33** | **8.25** | **1.0000** | **2.72** | **25.0%** |"]


def test_hub_ids_and_names(tmp_path, monkeypatch):
    cached = "/home/x/.cache/huggingface/hub/models--acme--tiny/snapshots/0123abcd"
    assert public_names.hub_id(cached) == public_names.base_name(cached) == "acme/tiny"
    (tmp_path / "started" / "models" / "tiny").mkdir(parents=True)
    assert public_names.hub_id("models/tiny") == "models/tiny"  # as far as one can see from here
    assert public_names.hub_id("models/tiny", str(tmp_path / "started" / "out"), "out") == ""
    monkeypatch.chdir(tmp_path / "started")
    assert public_names.hub_id("models/tiny") == ""
    for path, name in (
        ("/data/u/chats.jsonl", "chats.jsonl"),
        ("C:\\Users\\u\\m.gguf", "m.gguf"),
        ("gs://bucket/run/c.jsonl", "c.jsonl"),
        ("models/tiny/", "tiny"),
        (".", "started"),
        ("~/m", "m"),
    ):
        assert public_names.base_name(path) == name and public_names.hub_id(path) == ""
    for text in ("[/INST]", "</s>", "### Answer:", "{{ messages[0] }}/x", 3):
        assert public_names.scrubbed(text, ["/home/u"]) == text
    assert public_names.scrubbed({"a": ["see /home/u/x.txt in /home/u"]}, ["/home/u"]) == {"a": ["see x.txt in ..."]}


def test_the_license_is_the_bases_where_that_says_one(capsys, run, home, hub, tmp_path):
    assert "names no license" in push(capsys, run, "--repo", "me/x", "--dry-run")
    readme = home / "models" / "tiny-base" / "README.md"
    readme.write_text(
        "---\nlicense: other\nlicense_name: acme-1\nlicense_link: https://acme.org/license\n---\n# Tiny\n"
    )
    try:
        assert "names no license" not in push(capsys, run, "--repo", "me/x")
    finally:
        readme.unlink()
    data = card_of(hub, tmp_path).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other",
        "acme-1",
        "https://acme.org/license",
    )


def test_without_a_token_one_line_and_nothing_is_written(capsys, run, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(export, "export_merged", lambda *_: pytest.fail("merged before there was a token"))
    before = snapshot(run.parent)
    text = push(capsys, run, "--repo", "me/chatty", "--merge", status=1)
    assert text.count("\n") == 1 and "hf auth login" in text and "https://huggingface.co/settings/tokens" in text
    assert hub.calls == [] and snapshot(run.parent) == before


def answered(status, message):
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return huggingface_hub.errors.HfHubHTTPError(
        f"{status} Client Error\n\n{message}", response=response, server_message=message
    )


@pytest.mark.parametrize(
    ("call", "failure", "says"),
    [
        ("create_repo", lambda: answered(401, "Invalid username or password."), "does not accept the token (401)"),
        (
            "create_repo",
            lambda: answered(403, "You don't have the rights"),
            "may not write to me/chatty (403: You don't have",
        ),
        (
            "create_commit",
            lambda: answered(500, f"oops {TOKEN}"),
            "the repository is as it was: the hub answered 500: oops ***",
        ),
        (
            "create_commit",
            lambda: ConnectionError(f"no route, Bearer {TOKEN}\nsecond line"),
            "ConnectionError: no route, Bearer ***",
        ),
        ("create_commit", lambda: huggingface_hub.errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(capsys, run, hub, call, failure, says):
    hub.failure[call] = failure()
    before = snapshot(run.parent)
    text = push(capsys, run, "--repo", "me/chatty", status=1)
    assert says in text and text.count("\n") == 1 and hub.files == {}
    assert snapshot(run.parent) == before


def test_an_interrupted_upload_leaves_no_merged_model(capsys, run, hub):
    hub.watch(run.parent)
    hub.failure["create_commit"] = KeyboardInterrupt()
    before = snapshot(run.parent)
    assert main(["push", str(run), "--repo", "me/chatty", "--merge"]) == 130
    assert len(hub.existing) == 1 and list(run.parent.iterdir()) == [run] and snapshot(run.parent) == before


def test_a_public_repository_gets_nothing_that_should_be_private(capsys, run, hub):
    assert "is there already and is public" in push(capsys, run, "--repo", "me/chatty", "--private", status=1)
    assert [call[0] for call in hub.calls] == ["create_repo"] and hub.calls[0][2] is True
    hub.public = False
    push(capsys, run, "--repo", "me/chatty", "--private")
    assert hub.files


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--repo", "a/b/c"], "it must be NAMESPACE/NAME"),
        (["--repo", "me/a--b"], "it must be NAMESPACE/NAME"),
        (["--repo", "me/x", "--license", "Apache 2"], "--license is 'Apache 2'"),
        (["--repo", "me/x", "--base-model", "/home/me/base"], "it must be a hub id"),
        (["--repo", "me/x", "--gguf-type", "f16"], "--gguf-type belongs to --gguf"),
        (["--repo", "me/x", "--dtype", "float16"], "belong to --merge or --gguf"),
    ],
)
def test_what_cannot_be_asked_for(capsys, run, hub, words, says):
    text = push(capsys, run, *words, status=1)
    assert says in text and text.count("\n") == 1 and hub.calls == []


def test_what_is_no_finished_run(capsys, run, home, hub, tmp_path):
    assert "is not a run directory" in push(capsys, tmp_path, "--repo", "me/x", status=1)
    config = configuration.from_dict(json.loads((run / "config.json").read_text()))
    config.output_dir = str(tmp_path / "out")
    write_run(tmp_path / "out", config, [])
    assert "has no adapter/ yet" in push(capsys, tmp_path / "out", "--repo", "me/x", status=1)
    assert hub.calls == []
