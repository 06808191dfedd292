"""A user's mistakes: each ends in one clear line and a non-zero status, soon, and leaves nothing half-written."""

import errno
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
from helpers_training import write_rows, write_tiny_llama
from safetensors.numpy import load_file, save_file

import tpu_tune.training.opening
from tpu_tune import config as configuration
from tpu_tune.cli import main
from tpu_tune.cli.hf.listing import write_config
from tpu_tune.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def place(tmp_path, tiny):
    """A folder with good rows and a config that trains on them; `out` is the run directory that must not appear."""
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "config.py").write_text(
        "def get_config():\n    return {\n"
        f"        'output_dir': {str(tmp_path / 'out')!r}, 'model': {{'path': {str(tiny)!r}, 'dtype': 'float32'}},\n"
        f"        'data': {{'train': {str(tmp_path / 'rows.jsonl')!r}, 'cache_dir': {str(tmp_path / 'cache')!r},\n"
        "                 'max_length': 32, 'num_workers': 1},\n"
        "        'train': {'per_device_train_batch_size': 1, 'max_steps': 1, 'eval_strategy': 'no'},\n    }\n"
    )
    return tmp_path


@pytest.fixture
def refused(place, capsys, monkeypatch):
    """Function that trains with some keys changed, and returns the one line that refuses it before a weight is read."""

    def train(**keys):
        def too_late(*_, **__):
            raise AssertionError("the model is being loaded before this is found")

        monkeypatch.setattr(tpu_tune.training.opening, "prepare_model", too_late)
        before = sorted(place.iterdir())
        line = refusal(capsys, "train", "--config", place / "config.py", *words(keys))
        assert [path for path in sorted(place.iterdir()) if path.name != "cache"] == before
        return line

    return train


def words(keys):
    values = {key: value if isinstance(value, str | os.PathLike) else json.dumps(value) for key, value in keys.items()}
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


def refusal(capsys, *arguments):
    """Run a command that is to fail; return what it says: one line on stderr, after whatever the log says."""
    capsys.readouterr()
    status = main([str(word) for word in arguments])
    captured = capsys.readouterr()
    assert status == 1, captured
    lines = captured.err.strip().splitlines()
    assert "Traceback" not in captured.err and len(lines) == 1 and lines[0].startswith("tpu-tune: "), captured.err
    return lines[0].removeprefix("tpu-tune: ")


# --- models ---------------------------------------------------------------------------------------------------------


def test_no_model_there(refused, capsys):
    assert "model.path is empty" in refused(model__path="")
    assert "nowhere/model.gguf: there is no such file" in refused(model__path="nowhere/model.gguf")
    assert "there is no such file or directory" in refused(model__path="./nowhere")
    assert "no-such/model: not a local directory, and the Hugging Face hub" in refused(model__path="no-such/model")
    for command in (["inspect", "nowhere"], ["generate", "--model", "nowhere", "--prompt", "hi"]):
        assert "nowhere: there is no such file or directory" in refusal(capsys, *command)


@pytest.mark.parametrize("size", [0, 10, 5000, 50_000_000])
def test_a_gguf_that_is_cut_short(refused, place, smollm2_gguf, size):
    with open(smollm2_gguf, "rb") as whole:
        (place / "cut.gguf").write_bytes(whole.read(size))
    assert "cut.gguf: " in (line := refused(model__path=place / "cut.gguf")) and "fetch it again" in line


def test_what_is_no_gguf(refused, place):
    (place / "page.gguf").write_text("<html>404 not found, as a download may bring it</html>")
    assert "page.gguf: not a GGUF file" in refused(model__path=place / "page.gguf")


def test_a_gguf_of_an_unknown_architecture(refused, place):
    writer = gguf.GGUFWriter(str(place / "m.gguf"), "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    line = refused(model__path=place / "m.gguf")
    assert "m.gguf: architecture 'mamba' is not known" in line and "llama" in line and "qwen2" in line


@pytest.fixture
def copy(tiny, place):
    shutil.copytree(tiny, place / "copy")
    return place / "copy"


@pytest.mark.parametrize("size", [0, 4, 100, 60_000])
def test_safetensors_that_are_cut_short(refused, copy, size):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    line = refused(model__path=copy)
    assert f"{file}: cut short" in line and "fetch it again" in line


def test_safetensors_whose_header_is_not_one(refused, copy):
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b"not json!" + bytes(100))
    assert "header" in refused(model__path=copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not known (by the keys of its config, the nearest is 'llama'); the known "
            "architectures are llama, mistral, qwen2",
        ),
        ({"model_type": "qwen4"}, "model_type 'qwen4' is not known (did you mean 'qwen"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 3}, "9 tensors are missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "9 tensors are not part of a llama model: model.layers.1."),
        ({"intermediate_size": 65}, "has shape (64, 32), the config asks for (65, 32)"),
        ({"hidden_act": "tanhish"}, "activation 'tanhish' is not known"),
        ({"rope_scaling": {"rope_type": "axial", "factor": 2.0}}, "rope type 'axial'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ],
)
def test_a_model_directory_that_does_not_fit_its_config(refused, copy, change, says):
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    line = refused(model__path=copy)
    assert says in line and "copy" in line


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_directory_that_lacks_a_file(refused, copy, file):
    (copy / file).unlink()
    if file == "tokenizer.json":
        (copy / "tokenizer_config.json").unlink()
    line = refused(model__path=copy)
    assert str(copy) in line and ("no usable tokenizer" if "tokenizer" in file else file) in line


def test_a_config_that_is_not_json(refused, copy):
    (copy / "config.json").write_text('{"model_type": ')
    assert "config.json: not valid JSON" in refused(model__path=copy)


# --- names and settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"train__learning_rat": 1}, "unknown config key 'train.learning_rat'; did you mean 'train.learning_rate'?"),
        ({"train__learning_rate": "fast"}, "config key 'train.learning_rate' is 'fast'; it must be of type float"),
        ({"train__optim": "adamw8bit"}, "unknown train.optim 'adamw8bit'; did you mean 'adamw_8bit'?"),
        ({"train__lr_scheduler_type": "cosin"}, "unknown train.lr_scheduler_type 'cosin'; did you mean 'cosine'?"),
        ({"train__lr_scheduler_kwargs": {"cycles": 2}, "train__lr_scheduler_type": "cosine"}, "num_cycles"),
        ({"train__report_to": ["tensorbord"]}, "unknown train.report_to 'tensorbord'; did you mean 'tensorboard'?"),
        ({"mesh__fsdp": 3}, "does not make 8 devices"),
        ({"mesh__tensor": 3}, "does not make 8 devices"),
        ({"mesh__fsdp": 0}, "config key 'mesh.fsdp' is 0; it must be -1 or positive"),
        (
            {"mesh__sequence": 8, "mesh__fsdp": 1, "data__max_length": 30},
            "data.max_length=30 does not divide over mesh.sequence=8",
        ),
        ({"data__eval_ratio": 1.5}, "'data.eval_ratio' is 1.5; it must be at least 0 and below 1"),
        ({"lora__target_modules": "query"}, "'query' matches no module; choose among"),
        ({"lora__target_modules": ["q_proj", "query"]}, "'query' matches no module; choose among"),
        ({"lora__target_modules": "*_proj"}, "'*_proj' is not a regular expression"),
        ({"lora__target_modules": "norm"}, "has no matrix to adapt"),
        ({"lora__target_modules": "input_layernorm,q_proj"}, "has no matrix to adapt"),
        (
            {"lora__modules_to_save": ["classifier"]},
            "lora.modules_to_save: 'classifier' matches no module; choose among",
        ),
        ({"lora__modules_to_save": ["lm_head"]}, "it is tied to 'model.embed_tokens'"),
        (
            {"lora__layers_to_transform": [7]},
            "lora.layers_to_transform: no target is in the layers 7; they count from 0",
        ),
        ({"quantize__format": "nf4", "quantize__exclude": ["query"]}, "quantize.exclude"),
        ({"quantize__format": "nf4", "quantize__include": ["query"]}, "quantize.include: 'query' matches no module"),
        ({"method": "qlora"}, "method is 'qlora'; it must be one of full, lora"),
        ({"method": "full", "quantize__format": "nf4"}, "cannot be trained"),
        ({"method": "full", "model__param_dtype": "bfloat16"}, "model.param_dtype"),
        ({"method": "full", "model__adapter": "x"}, "model.adapter needs method=lora"),
        ({"model__adapter": "nowhere"}, "nowhere/adapter_config.json: there is no such file"),
    ],
)
def test_names_and_settings(refused, keys, says):
    assert says in refused(**keys)


def test_the_choices_are_listed(refused):
    line = refused(lora__target_modules="query")
    assert all(name in line for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


def test_a_config_file_that_is_not_there(capsys):
    assert "nowhere.py: there is no such config file" in refusal(capsys, "train", "--config", "nowhere.py")


def test_an_output_directory_that_cannot_be(refused, place):
    (place / "file").write_text("")
    assert "file is not a directory" in refused(output_dir=place / "file" / "out")


def test_the_run_directory_of_another_configuration(place, capsys):
    assert main(["train", "--config", str(place / "config.py")]) == 0
    held = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    line = refusal(
        capsys, "train", "--config", place / "config.py", "--config.lora.rank=4", "--config.train.learning_rate=1"
    )
    assert "holds a run with another configuration: lora.rank was 8 and is now 4; train.learning_rate was" in line
    assert "Choose another output_dir" in line
    assert held == {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}


def test_a_directory_that_is_no_run(place, capsys):
    assert "is not a run directory: it has no config.json" in refusal(capsys, "export", place, "--output", place / "x")
    (place / "config.json").write_text('{"model_type": "llama"}')
    assert "unknown config key 'model_type'" in refusal(capsys, "export", place, "--output", place / "x")
    assert not (place / "x").exists()


def test_export_of_a_run_that_has_not_finished(place, capsys):
    (place / "config.json").write_text("{}")
    assert "has no adapter/ yet" in refusal(capsys, "export", place, "--output", place / "x")
    line = refusal(capsys, "export", place, "--merge", "--output", place / "x")
    assert "the model that" in line and "model.path is empty" in line
    assert "belong to --merge" in refusal(capsys, "export", place, "--output", place / "x", "--dtype", "float32")
    assert not (place / "x").exists()


# --- data -----------------------------------------------------------------------------------------------------------


def test_no_data(refused, place):
    assert "no data given; set data.train" in refused(data__train="")
    assert "chats.jsonl: there is no such file or directory" in refused(data__train="chats.jsonl")
    assert "none.jsonl: there is no such file or directory" in refused(data__eval="none.jsonl")
    (place / "notes.docx").write_text("x")
    assert "unknown kind of data file '.docx'; known: .jsonl" in refused(data__train=place / "notes.docx")
    (place / "empty.jsonl").write_text("\n")
    assert "the file is empty" in refused(data__train=place / "empty.jsonl")
    (place / "folder").mkdir()
    assert "no data files in this directory" in refused(data__train=place / "folder")


BROKEN = '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": \n{"prompt": "c", "completion": "d"}\n[1]\n'


def test_a_broken_line_is_named_and_can_be_skipped(refused, place, capsys, caplog, monkeypatch):
    file = place / "broken.jsonl"
    file.write_text(BROKEN)
    line = refused(data__train=file)
    assert line.startswith(f"{file}:2: not valid JSON") and "data.skip_bad_rows=True" in line
    monkeypatch.undo()
    changes = words({"data__train": file, "data__skip_bad_rows": True, "data__eval_ratio": 0})
    with caplog.at_level("WARNING"):
        assert main(["train", "--config", str(place / "config.py"), *changes]) == 0
    assert f"2 bad rows skipped, first {file}:2: not valid JSON" in caplog.text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "answer": "b"}, "not known from its keys: question, answer; known formats: "),
        ({"prompt": "a", "completion": None}, "row 1: "),
        ({"messages": "hi"}, "row 1: 'messages' must be a non-empty list of messages"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "no chat template; set data.chat_template",
        ),
        ({"prompt": "x" * 100, "completion": "y"}, "nothing to learn in 1 row"),
        ({"prompt": "a", "completion": ""}, "nothing to learn in 1 row"),
    ],
)
def test_rows_that_cannot_be_learned_from(refused, place, row, says):
    file = place / "odd.jsonl"
    file.write_text(json.dumps(row) + "\n")
    keys = {"train__num_train_epochs": 1.0, "data__train": file}
    assert says in refused(**keys)


def test_a_format_that_the_rows_do_not_have(refused):
    line = refused(data__format="messages")
    assert "data.format is 'messages' but the first row has no 'messages'; its keys: prompt, completion" in line


def test_a_chat_template_that_is_not_jinja(refused, place):
    rows = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (place / "chats.jsonl").write_text(json.dumps({"messages": rows}) + "\n")
    line = refused(data__train=place / "chats.jsonl", data__chat_template="{% for m in messages %}{{ m.content }")
    assert "the chat template is not valid Jinja" in line


def test_a_tokenizer_of_another_model(refused, copy):
    config = json.loads((copy / "config.json").read_text()) | {"vocab_size": 100}
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100]
    save_file(tensors, copy / "model.safetensors")
    line = refused(model__path=copy)
    assert "is outside the model's vocabulary of 100" in line and "the tokenizer does not belong to this model" in line


# --- adapters -------------------------------------------------------------------------------------------------------


def write_adapter(directory, tensors, **config):
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("width", "config", "says"),
    [
        (48, {}, "has shape (8, 48), the base model asks for (8, 32)"),
        (32, {"target_modules": ["c_attn"]}, "'c_attn' matches no module"),
        (32, {"target_modules": ["q_proj", "k_proj"]}, "k_proj.lora_A.weight' is missing"),
        (32, {"peft_type": "IA3"}, "peft_type is IA3; only LORA is implemented"),
        (32, {"use_qalora": True}, "'use_qalora' is set and not implemented here"),
    ],
)
def test_an_adapter_that_does_not_fit(refused, place, capsys, tiny, width, config, says):
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {}
    for layer in range(2):
        tensors[prefix.format(layer, "A")] = np.zeros((8, width), np.float32)
        tensors[prefix.format(layer, "B")] = np.zeros((32, 8), np.float32)
    adapter = write_adapter(place / "adapter", tensors, **config)
    line = refused(model__adapter=adapter)
    assert says in line and str(adapter) in line
    command = ["generate", "--model", tiny, "--adapter", adapter, "--prompt", "hi", "--no-chat"]
    assert refusal(capsys, *command) == line


def test_an_adapter_given_as_a_model(refused, place):
    adapter = write_adapter(place / "adapter", {})
    assert "this is a PEFT adapter; give it as model.adapter and its base as model.path" in refused(model__path=adapter)


# --- the disk, and as a process of its own ----------------------------------------------------------------------------


def limited(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def process(*arguments, **options):
    found = subprocess.run(
        [sys.executable, "-m", "tpu_tune", *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )
    assert "Traceback" not in found.stderr, found.stderr
    return found


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as from writing to an open file: it names none


@pytest.fixture
def run_to_draw(tmp_path):
    rows = [{"step": step, "loss": 3.0 / step} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("option", ["--output", "--html"])
def test_a_full_disk_under_a_picture(run_to_draw, capsys, monkeypatch, option):
    monkeypatch.setattr(os, "fsync", full)
    line = refusal(capsys, "curves", run_to_draw, option, run_to_draw / "x.png")
    assert line == f"{run_to_draw / 'x.png'} cannot be written: No space left on device"
    assert [path.name for path in run_to_draw.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_under_what_is_printed(run_to_draw, capsys, monkeypatch):
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["curves", str(run_to_draw)]) == 1
    assert capsys.readouterr().err == "tpu-tune: what this command prints cannot be written: No space left on device\n"


def test_a_full_disk_leaves_the_config_that_was_there(tmp_path, monkeypatch):
    (tmp_path / "c.py").write_text("mine")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"c.py cannot be written: No space left on device"):
        write_config(configuration.default(), str(tmp_path / "c.py"))
    assert (tmp_path / "c.py").read_text() == "mine"


def test_a_process_says_one_line_and_fails(place):
    found = process("train", "--config", place / "config.py", "--config.model.path=nowhere")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == "tpu-tune: nowhere: there is no such file or directory\n"
    assert not (place / "out").exists()


def test_a_disk_without_room_for_the_data_cache_is_no_reason_to_stop(place, caplog):
    (place / "cache").write_text("a file where the cache should be")
    with caplog.at_level("WARNING"):
        assert main(["train", "--config", str(place / "config.py")]) == 0
    assert "could not be cached" in caplog.text


def test_a_full_disk_during_export(place):
    assert main(["train", "--config", str(place / "config.py")]) == 0
    for words_ in (("--merge",), ("--base",)):
        found = process("export", place / "out", "--output", place / "x", *words_, preexec_fn=limited(60_000))
        assert found.returncode == 1 and found.stderr.startswith(f"tpu-tune: {place / 'x'} cannot be written: "), (
            found.stderr
        )
        assert not [path.name for path in place.iterdir() if path.name.lstrip(".").startswith("x")]
    found = process("export", place / "out", "--output", place / "x.gguf", "--gguf", preexec_fn=limited(30_000))
    assert found.stderr == f"tpu-tune: {place / 'x.gguf'} cannot be written: File too large\n" and found.returncode == 1
    assert not [path.name for path in place.iterdir() if path.name.lstrip(".").startswith("x")]


def test_a_full_disk_at_the_beginning_of_a_run(place):
    found = process("train", "--config", place / "config.py", preexec_fn=limited(200))
    assert found.returncode == 1 and "could not be cached" in found.stderr
    # The run's lock comes first; where the host's name is long, it is what does not fit.
    said = r"(config\.json cannot be written|output_dir .*/out cannot be made or written): File too large\n$"
    assert re.search(said, found.stderr), found.stderr
    assert not (place / "out" / "config.json").exists()


def test_a_device_that_is_full(place, capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore lines")

    monkeypatch.setattr(tpu_tune.training.opening, "prepare_model", full)
    line = refusal(capsys, "train", "--config", place / "config.py")
    assert "the device ran out of memory" in line and "train.per_device_train_batch_size" in line
