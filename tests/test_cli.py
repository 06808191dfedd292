"""The command line and the Python API from end to end, on a tiny model and on SmolLM2."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers_training import write_rows, write_tiny_llama

import tpu_tune
from tpu_tune.cli import main

COMMANDS = ("train", "plan", "lr-find", "curves", "generate", "chat", "serve", "eval", "export", "push", "inspect")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def config_file(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("config")
    rows = write_rows(directory / "rows.jsonl")
    file = directory / "tiny.py"
    file.write_text(
        "from tpu_tune.config import default\n\ndef get_config():\n    c = default()\n"
        f"    c.model.path, c.data.train, c.data.cache_dir = {str(tiny)!r}, {str(rows)!r}, {str(directory)!r}\n"
        "    c.model.dtype, c.data.max_length, c.data.num_workers = 'float32', 32, 1\n"
        "    c.quantize.format, c.quantize.group_size = 'nf4', 32\n"
        "    c.train.per_device_train_batch_size, c.train.max_steps, c.train.learning_rate = 1, 2, 1e-2\n"
        "    c.lora.target_modules, c.lora.init_lora_weights = 'all-linear', 'gaussian'\n    return c\n"
    )
    return file


@pytest.fixture(scope="module")
def run(config_file, tmp_path_factory):
    """A finished QLoRA run's directory."""
    directory = tmp_path_factory.mktemp("run") / "out"
    assert main(["train", "--config", str(config_file), f"--config.output_dir={directory}"]) == 0
    return directory


def out_of(capsys, *words):
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


@pytest.mark.parametrize("words", [(), *[(command,) for command in COMMANDS]])
def test_help_shows_an_example(capsys, words):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    if words:
        assert f"example:\n  tpu-tune {words[0]} " in text
    else:
        assert all(command in text for command in COMMANDS)


def test_the_examples_of_the_help_are_accepted(capsys):
    from tpu_tune.cli.program import make_parser

    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        example = capsys.readouterr().out.rstrip().rsplit("\n", 1)[-1].split()
        words = [word for word in example[1:] if not word.startswith("--config.")]
        make_parser().parse_args(" ".join(words).replace('"', "").replace("What is AI?", "hi").split())


def test_the_config_files_that_the_help_names_are_there():
    import argparse

    from tpu_tune.cli.program import make_parser

    def helps(parser):
        yield parser.format_help()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from helps(inner)

    root = pathlib.Path(__file__).parents[1]
    named = {name for text in helps(make_parser()) for name in re.findall(r"configs/\w+\.py", text)}
    assert len(named) > 1 and all((root / name).is_file() for name in named), named


def test_as_a_module_and_its_version():
    found = subprocess.run([sys.executable, "-m", "tpu_tune", "--version"], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, f"tpu-tune {tpu_tune.__version__}\n")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trian"],
        ["train"],
        ["export", "x"],
        ["train", "--config", "x", "--config.seed"],
        ["inspect", "x", "--lora.rank=3"],
        ["generate", "--model", "x", "--config.seed=1"],
        ["export", "x", "--output", "y", "--merge", "--base"],
        ["export", "x", "--output", "y", "--gguf", "--merge"],
        ["export", "x", "--output", "y", "--gguf", "--gguf-type", "q9_0"],
    ],
)
def test_a_wrong_command_line_is_status_2(capsys, words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_config_key_without_its_prefix_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "x", "--lora.rank=3"])
    assert "written --config.lora.rank" in capsys.readouterr().err


def test_both_spellings_of_an_override(capsys, tiny):
    joined = out_of(capsys, "inspect", tiny, "--config.lora.rank=3", "--json")
    apart = out_of(capsys, "inspect", "--config.lora.rank", "3", tiny, "--json")
    assert joined == apart
    assert {target["rank"] for target in json.loads(joined)["lora"]["targets"]} == {3}


def test_lists_as_text_and_as_json(capsys, tiny):
    as_text = out_of(capsys, "inspect", tiny, "--config.lora.target_modules=q_proj,v_proj")
    assert as_text == out_of(capsys, "inspect", tiny, '--config.lora.target_modules=["q_proj", "v_proj"]')
    assert as_text == out_of(capsys, "inspect", tiny, r"--config.lora.target_modules=.*\.(q|v)_proj")
    # rank 8 over 32 -> 32 and 32 -> 16, two layers
    assert f"trainable params: {2 * 8 * (64 + 48):,} || all params: 28,832 || trainable%: 6.2153" in as_text


def test_inspect_counts_as_peft_does(capsys, tiny):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    for given in ({}, {"bias": "lora_only"}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}):
        words = [
            f"--config.lora.{key}={json.dumps(value) if isinstance(value, list) else value}"
            for key, value in given.items()
        ]
        model = AutoModelForCausalLM.from_pretrained(tiny)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"], **given))
        trained, total = model.get_nb_trainable_parameters()
        facts = json.loads(
            out_of(capsys, "inspect", tiny, "--json", "--config.lora.target_modules=q_proj,down_proj", *words)
        )
        assert (facts["lora"]["trainable"], facts["lora"]["all"]) == (trained, total), given


def test_inspect_smollm2(capsys, smollm2_gguf):
    text = out_of(capsys, "inspect", smollm2_gguf)
    for line in ("hidden_size: 576", "num_layers: 30", "num_heads: 9", "num_kv_heads: 3", "vocab_size: 49,152"):
        assert line in text
    assert "134,515,008 parameters" in text
    shapes = {
        "model.embed_tokens": "49152 x 576", "model.layers.N.self_attn.q_proj": "576 x 576",
        "model.layers.N.self_attn.k_proj": "576 x 192", "model.layers.N.mlp.down_proj": "1536 x 576",
    }  # fmt: skip
    for name, shape in shapes.items():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{name} ")]
        assert shape in line
    # PEFT's count for r=8 on all linear layers of this model.
    trained = 30 * 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert f"trainable params: {trained:,} || all params: {134515008 + trained:,} || trainable%: 1.7832" in text
    facts = json.loads(out_of(capsys, "inspect", smollm2_gguf, "--json"))
    assert facts["hidden_size"] == 576 and facts["lora"]["trainable"] == trained
    assert {"name", "shape", "layers", "role"} <= set(facts["modules"][0])


def test_train_writes_the_run_directory_and_says_done_the_second_time(capsys, run, config_file):
    assert {"config.json", "metrics.jsonl", "curves.png", "report.html", "checkpoints", "adapter"} <= set(
        os.listdir(run)
    )
    before = (run / "metrics.jsonl").read_text()
    text = out_of(capsys, "train", "--config", config_file, f"--config.output_dir={run}", "--json")
    facts = json.loads(text)  # nothing but JSON on standard output
    assert facts == {"status": "already finished", "step": 2, "output_dir": str(run), "result": str(run / "adapter")}
    assert (run / "metrics.jsonl").read_text() == before


def test_export_adapter(capsys, run, tmp_path):
    assert "PEFT adapter" in out_of(capsys, "export", run, "--output", tmp_path / "a")
    for name in os.listdir(run / "adapter"):
        assert (tmp_path / "a" / name).read_bytes() == (run / "adapter" / name).read_bytes()


@pytest.fixture(scope="module")
def trained(run, tiny):
    """Logits of the model as it was trained: nf4 base with its adapter in groups of 32."""
    from helpers_training import make_config

    from tpu_tune.checkpoints.run_directory import RunDirectory
    from tpu_tune.inference.model import logits
    from tpu_tune.inference.run_model import open_base

    config = RunDirectory(run).config()
    assert config == make_config(**{key.replace(".", "__"): value for key, value in tpu_tune.config.flatten(config)})
    from tpu_tune.checkpoints import peft
    from tpu_tune.checkpoints.params import load_params, open_architecture
    from tpu_tune.transforms import QuantizeConfig, find_targets

    source = open_base(RunDirectory(run), config)
    arch = open_architecture(source)
    quantization = QuantizeConfig(**config.quantize)  # no argument of load has a group size
    params = load_params(source, arch, np.float32, quantization)
    spec, adapters = peft.read_adapter(str(run / "adapter"), arch)
    targets = find_targets(arch.modules(), spec, arch.default_targets)
    tree = targets.combine(*targets.split(params, adapters))
    return np.asarray(logits(arch, np.dtype("float32"), tree, IDS.astype(np.int32)))


IDS = np.random.default_rng(0).integers(0, 258, (2, 12))


def test_merged_into_the_dequantized_base_is_exact(capsys, run, trained, tmp_path):
    text = out_of(capsys, "export", run, "--merge", "--merge-base", "dequantized", "--output", tmp_path / "m")
    assert "first guess is the same in 100.0% of places" in text and "logits differ by at most" in text
    merged = tpu_tune.load(str(tmp_path / "m"))
    assert np.abs(merged(IDS) - trained).max() < 1e-4 * np.abs(trained).max()
    assert not (tmp_path / ".m.tmp").exists()


def test_merged_into_the_original_is_another_model_and_says_by_how_much(capsys, run, trained, tiny, tmp_path):
    facts = json.loads(out_of(capsys, "export", run, "--merge", "--output", tmp_path / "m", "--json"))
    assert facts["relative_logit_difference"] > 0.01
    merged = tpu_tune.load(str(tmp_path / "m"))
    unquantized = tpu_tune.load(str(tiny), adapter=str(run / "adapter"))
    np.testing.assert_allclose(merged(IDS), unquantized(IDS), atol=1e-4 * np.abs(trained).max())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tiny / name).read_bytes()


def test_the_exported_base_with_the_adapter_is_the_trained_model(capsys, run, trained, tmp_path):
    out_of(capsys, "export", run, "--base", "--output", tmp_path / "b")
    model = tpu_tune.load(str(tmp_path / "b"), adapter=str(run / "adapter"))
    assert np.abs(model(IDS) - trained).max() < 1e-4 * np.abs(trained).max()


def test_export_in_another_dtype(capsys, run, tmp_path):
    out_of(capsys, "export", run, "--merge", "--dtype", "bfloat16", "--output", tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_export_as_gguf_is_the_merged_model(capsys, run, tmp_path):
    import gguf

    file = tmp_path / "m.gguf"
    text = out_of(capsys, "export", run, "--gguf", "--output", file)
    assert "the merged model as GGUF, F16" in text and "logits differ by at most" in text
    out_of(capsys, "export", run, "--merge", "--output", tmp_path / "m")
    merged, written = tpu_tune.load(str(tmp_path / "m")), tpu_tune.load(str(file))
    assert written.tokenizer("hi").input_ids == merged.tokenizer("hi").input_ids
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert stored["blk.0.ffn_up.weight"].tensor_type.name == "F16"
    up = np.asarray(merged.params["model.layers.mlp.up_proj.weight"][0]).T
    np.testing.assert_array_equal(stored["blk.0.ffn_up.weight"].data, up.astype(np.float16))
    assert np.abs(merged(IDS) - written(IDS)).max() < 5e-3 * np.abs(merged(IDS)).max()


@pytest.mark.parametrize(("kind", "error"), [("f16", 5e-3), ("bf16", 4e-2), ("q8_0", 8e-2)])
def test_export_as_gguf_says_how_far_it_is_from_what_was_trained(capsys, run, tmp_path, kind, error):
    words = ("--gguf", "--merge-base", "dequantized", "--gguf-type", kind, "--output", tmp_path / "m.gguf", "--json")
    facts = json.loads(out_of(capsys, "export", run, *words))
    assert 0 < facts["relative_logit_difference"] < error


def test_export_as_gguf_refuses(capsys, run, tmp_path):
    for words, says in (
        (("--gguf", "--output", tmp_path / "m"), "a GGUF file's name ends with .gguf"),
        (("--gguf", "--dtype", "bfloat16", "--output", tmp_path / "m.gguf"), "chosen with --gguf-type"),
        (("--merge", "--gguf-type", "f16", "--output", tmp_path / "m"), "--gguf-type belongs to --gguf"),
        (("--gguf", "--output", tmp_path / "none" / "m.gguf"), "m.gguf cannot be written: No such file or directory"),
    ):
        assert main(["export", str(run), *map(str, words)]) == 1
        assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_export_replaces_nothing(capsys, run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for words in ((), ("--merge",), ("--base",)):
        for place in (tmp_path / "mine", run):
            assert main(["export", str(run), "--output", str(place), *words]) == 1
            assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists() and (run / "config.json").exists()


def test_full_run_and_its_export(capsys, config_file, tmp_path):
    out = tmp_path / "full"
    rows = out_of(
        capsys,
        "train",
        "--config",
        config_file,
        f"--config.output_dir={out}",
        "--config.method=full",
        "--config.quantize.format=none",
        "--config.train.max_steps=1",
    )
    assert str(out / "model") in rows and (out / "model" / "model.safetensors").exists()
    assert "has no adapter: every weight was trained" in out_of(capsys, "export", out, "--output", tmp_path / "a")
    for file in (out / "model").iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    out_of(capsys, "export", out, "--merge", "--output", tmp_path / "m")
    np.testing.assert_array_equal(tpu_tune.load(str(tmp_path / "m"))(IDS), tpu_tune.load(str(out / "model"))(IDS))
    facts = json.loads(out_of(capsys, "export", out, "--gguf", "--output", tmp_path / "m.gguf", "--json"))
    assert 0 < facts["relative_logit_difference"] < 5e-3


def test_load_gives_float32_logits_a_tokenizer_and_the_tree(tiny):
    for dtype in ("float32", "bfloat16"):
        model = tpu_tune.load(str(tiny), dtype=dtype)
        logits = model(IDS)
        assert logits.shape == (2, 12, 264) and logits.dtype == np.float32
        assert model.params["model.layers.self_attn.q_proj.weight"].shape == (2, 32, 32)
        assert str(model.params["model.layers.self_attn.q_proj.weight"].dtype) == dtype
    assert model.tokenizer("hi")["input_ids"] == [ord("h"), ord("i")]
    assert model([[1, 2, 3]]).shape == (1, 3, 264)


def test_load_quantized(tiny):
    from tpu_tune.tensors import QuantizedTensor

    model = tpu_tune.load(str(tiny), quantize="int8")
    assert isinstance(model.params["model.layers.mlp.up_proj.weight"], QuantizedTensor)
    assert not isinstance(model.params["model.embed_tokens.weight"], QuantizedTensor)
    whole = np.asarray(tpu_tune.load(str(tiny))(IDS))
    assert 0 < np.abs(model(IDS) - whole).max() < 0.1 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dtype": "fp16"}, "float32, bfloat16, float16"),
        ({"quantize": "int3"}, "int8, int4, nf4"),
        ({"adapter": "none"}, "adapter"),
    ],
)
def test_load_refuses(tiny, arguments, says):
    with pytest.raises(tpu_tune.UserError, match=says):
        tpu_tune.load(str(tiny), **arguments)


def test_logits_want_two_axes(tiny):
    with pytest.raises(tpu_tune.UserError, match="batch, time"):
        tpu_tune.load(str(tiny))([1, 2, 3])


def test_train_from_python(config_file, tmp_path, capsys):
    config = tpu_tune.config.from_file(config_file)
    config.output_dir, config.train.max_steps, config.train.eval_strategy = str(tmp_path / "out"), 1, "no"
    run = tpu_tune.train(config)
    assert (run.status, run.step, run.output_dir) == ("finished", 1, str(tmp_path / "out"))
    assert [row["step"] for row in run.metrics] == [1] and run.result_dir == str(tmp_path / "out" / "adapter")
    again = tpu_tune.train(tpu_tune.config.to_dict(config))  # plain dicts do as well
    assert again.status == "already finished" and again.metrics == run.metrics


def test_a_reader_that_has_seen_enough(tiny):
    command = f'"{sys.executable}" -m tpu_tune inspect "{tiny}" | head -1'
    found = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "parameters" in found.stdout and found.stderr == ""
