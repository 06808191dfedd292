"""`tpu-tune plan`: catalogue, presets, byte counts, the guide's figures, real compiles, and users' mistakes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest
from helpers_training import write_rows, write_tiny_llama

import tpu_tune
from tpu_tune import config as configuration
from tpu_tune import planning
from tpu_tune.cli import main
from tpu_tune.cli.memory_check import check_memory
from tpu_tune.errors import UserError
from tpu_tune.kernels.blockwise import BLOCK
from tpu_tune.models import architecture
from tpu_tune.planning import compile_process, compile_step
from tpu_tune.planning.figures import figures, rules_of_thumb
from tpu_tune.planning.flops import step_work
from tpu_tune.planning.presets import PRESETS
from tpu_tune.planning.scratch import score_bytes
from tpu_tune.planning.suggest import _next_guess as next_guess
from tpu_tune.planning.suggest import suggest

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
GB = 1e9

# As the Hugging Face hub shows them, or the models' own papers (of Gemma 3 4B without its vision tower and projector,
# 416,866,032 and 2,950,272 of 4,300,079,472).
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-6.9b": 6_857_302_016,
    "pythia-1b": 1_011_781_632,
    "redpajama-3b": 2_775_864_320,
    "gpt-j-6b": 6_050_882_784,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "opt-125m": 125_239_296,
    "opt-6.7b": 6_658_473_984,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    # Those of the whole models, less the vision tower's and the projector's.
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - (2560 + 1) * 1152,
    "gemma-3-12b": 12_187_325_040 - 416_866_032 - (3840 + 1) * 1152,
    "gemma-3-27b": 27_432_406_640 - 416_866_032 - (5376 + 1) * 1152,
    # Of transformers' Qwen3_5ForCausalLM of these sizes.
    "qwen3.5-4b": 4_205_751_296,
    "qwen3.5-9b": 8_953_803_264,
    "qwen3.5-27b": 26_895_998_464,
    # transformers counts so many in Gemma4ForCausalLM; E4B's file of 7,996,156,490 numbers has beside them vision,
    # audio, and keys' and values' weights of the layers that use none.
    "gemma-4-e4b": 7_463_013_376 + 42,
    "gemma-4-31b": 30_697_345_280 + 60,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-7b": 7_298_617_344,
    "olmo-3-7b": 7_298_011_136,
    "granite-3.3-8b": 8_170_864_640,
    "granite-4.0-micro": 3_402_836_480,
    "ministral-3-3b": 3_429_006_336,
    "ministral-3-8b": 8_489_553_920,
    "glm-4-9b": 9_399_951_360,
    "glm-4-9b-0414": 9_400_279_040,
    "command-r-35b": 34_980_831_232,
    "aya-expanse-8b": 8_028_033_024,
    "command-r7b": 8_028_033_024,
    "seed-oss-36b": 36_151_104_512,
    "exaone-4-32b": 32_003_216_384,
    "nanochat-d20": 560_988_160,
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "t5-small": 60_506_624,
    "flan-t5-base": 247_577_856,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
}
QLORA = {
    "method": "lora",
    "model": {"dtype": "bfloat16"},
    "quantize": {"format": "nf4", "double_quant": True},
    "lora": {"rank": 16},
    "train": {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1},
}


def settings(path, **changes):
    """A QLoRA configuration of a model; `changes` are dotted keys with `__` for the dot."""
    config = configuration.from_dict({**QLORA, "model": {**QLORA["model"], "path": path}})
    for key, value in changes.items():
        configuration.assign(config, key.replace("__", "."), value)
    return configuration.check(config)


def counted(config, device="h200", **words):
    return planning.plan(config, device, compile=False, **words)


@pytest.fixture(autouse=True)
def bytes_are_counted_here(monkeypatch):
    """Count bytes in this process, which has eight CPU devices; compiling goes to a process of its own as ever."""
    module = importlib.import_module("tpu_tune.planning.figures")

    def run_job(job, kind, timeout=600.0):
        return compile_process.run_job(job, kind, timeout) if job["compile"] else compile_step.measure(job)

    monkeypatch.setattr(module, "run_job", run_job)


def test_bytes_are_counted_without_a_process(monkeypatch):
    expected = counted(settings("smollm2-135m"), "v5e-8")
    monkeypatch.setattr(importlib.import_module("tpu_tune.planning.figures"), "run_job", compile_process.run_job)
    monkeypatch.setattr(compile_process.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert counted(settings("smollm2-135m"), "v5e-8") == expected
    with pytest.raises(pytest.fail.Exception):  # more devices than there are here
        counted(settings("smollm2-135m"), "v5e-64")


# The catalogue and the presets


def test_the_catalogue_has_what_the_compilers_say():
    # libtpu 0.0.42's "exceeds available HBM (...)", and how many devices jax has on such a slice.
    for name, count, gib in [
        ("v2-8", 8, 7.48),
        ("v3-8", 8, 15.48),
        ("v4-8", 4, 30.75),
        ("v5e-1", 1, 15.75),
        ("v5e-64", 64, 15.75),
        ("v6e-8", 8, 31.25),
        ("tpu7x-8", 8, 94.75),
        ("v5p-8", 4, 95.74),
        ("v4-32", 16, 30.75),
    ]:
        device = planning.find_device(name)
        assert (device.count, device.capacity) == (count, int(gib * 2**30)), name
    assert all(planning.find_device(name).name == name for name in planning.NAMES)


def test_a_gpu_has_what_the_launcher_lets_it_take(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    text = open(os.path.join(os.path.dirname(__file__), "..", "launch", "common.sh")).read()
    card = planning.find_device("rtx4090")
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92" in text
    assert card.capacity == int(23.53 * 2**30 * 0.92) - 2**28
    assert "92% of 25.3 GB" in card.capacity_note
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert planning.find_device("rtx4090").capacity == int(23.53 * 2**30 * 0.5) - 2**28
    several = [planning.find_device(text) for text in ("h100 x2", "h100x2", "H100 x 2")]
    assert {(one.name, one.count, one.topology["topology"]) for one in several} == {("h100 x2", 2, "1x1x2")}


@pytest.mark.parametrize(
    "text, said",
    [
        ("v5e", "did you mean v5e"),
        ("rtx309", "did you mean rtx3090"),
        ("v5e-3", "choose v5e-1, v5e-4, v5e-8"),
        ("v5e-1 x2", "TPUs come in slices"),
        ("h100 x0", "at least one"),
        ("", "unknown device"),
        ("rtx9999", "rtx9999"),
    ],
)
def test_an_unknown_device_is_told_with_what_there_is(text, said):
    with pytest.raises(UserError, match=said) as error:
        planning.find_device(text)
    assert "\n" not in str(error.value)


def test_devices_by_what_jax_calls_them():
    named = {
        ("TPU v5 lite", 1): "v5e-1", ("TPU v3", 8): "v3-8", ("TPU v4", 4): "v4-8", ("TPU v6 lite", 8): "v6e-8",
        ("TPU7x", 16): "tpu7x-16", ("NVIDIA B200", 1): "b200", ("NVIDIA GB10", 1): "gb10",
        ("NVIDIA GeForce RTX 4090", 2): "rtx4090 x2",
    }  # fmt: skip
    assert {key: planning.device_of(*key).name for key in named} == named
    assert planning.device_of("NVIDIA GeForce GTX 680", 1) is None and planning.device_of("TPU v5 lite", 3) is None
    assert planning.local_device() is None  # the tests run on CPU devices


def test_presets_have_the_published_numbers_of_parameters():
    counts = {
        name: sum(math.prod(shape) for shape in architecture(PRESETS[name]).leaf_shapes().values())
        for name in PUBLISHED
    }
    assert counts == PUBLISHED
    twins = {"llama-2-7b", "llama-2-13b", "llama-3.1-8b", "llama-3.1-70b"}  # of sizes that are in the table
    assert set(PRESETS) == set(PUBLISHED) | twins


# The guide's figures


def test_the_rules_of_thumb_are_the_guides():
    rules = rules_of_thumb(PUBLISHED["llama-7b"])
    assert rules["full_fine_tuning_16_bytes_a_parameter_gb"] == pytest.approx(107.8, abs=0.05)
    assert rules["guide_full_fine_tuning_6b_7b_gb"] == [160, 192]
    assert rules_of_thumb(6_750_000_000)["inference_16_bit_gb"] == pytest.approx(16.2, abs=0.01)  # a file of 13.5 GB
    assert rules_of_thumb(PUBLISHED["llama-65b"])["full_fine_tuning_16_bit_gb"] > 780


@pytest.mark.parametrize("device", ["v5e-1", "t4"])
def test_full_fine_tuning_of_7b_is_sixteen_bytes_a_parameter_and_does_not_fit(device):
    found = counted(
        {"method": "full", "model": {"path": "llama-7b"}, "train": {"per_device_train_batch_size": 1}}, device
    )
    parts = found["breakdown"]
    kept = sum(parts[name] for name in ("frozen", "trainable", "gradients", "optimizer"))
    assert kept / GB == pytest.approx(107.8, abs=0.1)
    assert (device == "t4") == any("set model.dtype=float16" in note for note in found["notes"])
    assert parts["frozen"] == 0 and parts["trainable"] == parts["gradients"] == 4 * PUBLISHED["llama-7b"]
    assert not found["fits"] and "160-192 GB" in planning.table(found) and "DOES NOT FIT" in planning.table(found)


def test_lora_on_q_and_v_trains_what_peft_trains():
    found = counted(settings("llama-7b", lora__rank=8, lora__target_modules=["q_proj", "v_proj"]))
    assert (found["model"]["trainable"], found["model"]["parameters"]) == (4_194_304, 6_742_609_920)
    assert "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622" in planning.table(found)
    assert found["breakdown"]["trainable"] == 4 * 4_194_304


def test_65b_in_four_bits_is_held_by_48_gb():
    # As in the QLoRA paper: rank 64 on every linear layer, rows of 512 tokens.
    found = counted(settings("llama-65b", lora__rank=64, data__max_length=512), "rtx6000ada-48g")
    assert 40 * GB < sum(found["breakdown"].values()) - found["breakdown"]["scratch"] < 48 * GB
    assert found["rules_of_thumb"]["full_fine_tuning_16_bit_gb"] > 780


def test_four_bits_are_half_a_byte():
    found = counted(settings("llama-7b"))
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rest = (PUBLISHED["llama-7b"] - linear) * 2  # bfloat16: embedding, head, norms
    scales = linear / 64 + 4 * 32 * (4 * 4096 + 2 * 11008 + 4096)  # a byte a group, a float32 a column
    assert found["breakdown"]["frozen"] == linear / 2 + rest + scales
    assert found["breakdown"]["optimizer"] == pytest.approx(8 * found["model"]["trainable"], abs=64)


def test_scores_grow_with_the_square_of_the_row_unless_attention_is_blockwise():
    arch = architecture(PRESETS["llama-7b"])
    short, long = (score_bytes(arch, 1, tokens, tokens, "reference", 1) for tokens in (2048, 4096))
    assert long == 4 * short == 4 * 32 * 2048 * 2048 * 4
    short, long = (score_bytes(arch, 1, tokens, tokens, "blockwise", 1) for tokens in (2048, 4096))
    assert long == short == 32 * BLOCK * BLOCK * 4  # one block of queries against one of keys


def test_work_is_four_or_six_times_parameters_and_tokens():
    arch = architecture(PRESETS["llama-7b"])
    matrices = PUBLISHED["llama-7b"] - 32000 * 4096 - 65 * 4096
    seen = 2048 * 2049 / 2 * 4 * 4096 * 32  # both products of attention, forward, over what a causal mask leaves
    full = step_work(arch, configuration.from_dict({"method": "full", "model": {"remat": "none"}}), 3, 2048, 0, 0)
    assert full.model == pytest.approx(3 * (6 * matrices * 2048 + 3 * seen), rel=1e-9)
    lora = step_work(arch, configuration.from_dict({"model": {"remat": "full"}}), 3, 2048, 0, 1000)
    assert lora.model == pytest.approx(3 * (4 * matrices * 2048 + 3 * seen + 6 * 1000 * 2048), rel=1e-9)
    again = 2 * (matrices - 32000 * 4096) * 2048 + 4 * seen * 2 * 2048 / 2049  # remat repeats the layers, not the head
    hidden = 3 * seen * 2 * 2048 / 2049 - 3 * seen
    assert lora.hardware - lora.model == pytest.approx(3 * (again - seen * 2 * 2048 / 2049 * 3 + hidden), rel=1e-6)


# The run


@pytest.mark.parametrize(
    "rows, batch, steps, kind",
    [
        (200, 5, 40, "mini-batch"),
        (203, 5, 41, "mini-batch"),
        (200, 200, 1, "batch"),
        (200, 1, 200, "stochastic"),
    ],
)
def test_steps_of_the_run(rows, batch, steps, kind):
    config = settings("smollm2-135m", train__per_device_train_batch_size=batch, train__num_train_epochs=1000)
    found = counted(config, rows=rows)["run"]
    assert (found["steps_per_epoch"], found["total_steps"], found["gradient_descent"]) == (steps, 1000 * steps, kind)


def test_more_rows_a_step_than_there_are():
    with pytest.raises(UserError, match="a step takes 8 rows and there are only 5"):
        counted(settings("smollm2-135m", train__per_device_train_batch_size=8), rows=5)


def test_rows_are_guessed_from_the_files(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    lines = len(rows.read_text().splitlines())
    config = settings("smollm2-135m", data__train=str(rows), data__packing=False, data__eval_ratio=0.5)
    found = counted(config)["run"]
    assert found["rows"] == lines // 2 and "guess" in found["rows_are"]
    assert counted(settings("smollm2-135m", data__train=str(tmp_path / "absent.jsonl")))["run"]["rows"] is None


# Models from files, encoders, meshes


def test_a_model_from_its_config_alone_and_from_gguf(tmp_path, smollm2_gguf):
    preset = counted(settings("smollm2-135m"))
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["smollm2-135m"]))
    for path in (str(tmp_path), str(tmp_path / "config.json"), str(smollm2_gguf)):
        assert counted(settings(path))["breakdown"] == preset["breakdown"], path
    grown = counted(settings(str(tmp_path), model__add_special_tokens=["<a>", "<b>"]))
    assert grown["breakdown"]["frozen"] - preset["breakdown"]["frozen"] == 2 * 576 * 2


def test_an_encoder_decoder_has_both_batches():
    found = counted(settings("flan-t5-base", data__source_max_len=300, data__target_max_len=60, data__max_length=512))
    assert found["breakdown"]["batch"] == 4 * (4 * 64 + 2 * 320)
    assert found["step"]["tokens"] == 64 + 320


def test_a_mesh_shares_what_is_held():
    one, eight = (counted(settings("llama-7b"), name)["breakdown"] for name in ("v5e-1", "v5e-8"))
    assert one["frozen"] / eight["frozen"] == pytest.approx(8, rel=0.01)
    assert eight["optimizer"] < one["optimizer"]  # the rows of B stay whole under fsdp
    assert one["batch"] == eight["batch"]


@pytest.mark.parametrize(
    "given, said",
    [
        (["--device", "v5e-8", "--config.mesh.fsdp=3"], "mesh.fsdp=3, .* does not make 8 devices"),
        (
            ["--device", "v5e-8", "--config.mesh.sequence=8", "--config.data.max_length=100"],
            "does not divide over mesh.sequence",
        ),
        (["--device", "v5e-9000"], "there is no such slice"),
        (["--device", "v5e-1", "--config.model.path=absent-model"], "absent-model: there is no such file"),
        (["--device", "v5e-1", "--config.model.path="], "model.path is empty"),
        (["--device", "v5e-1", "--config", "absent.py"], "absent.py: there is no such config file"),
        (["--device", "v5e-1", "--config.lora.target_modules=nothing_here"], "nothing_here"),
        (["--device", "v5e-1", "--config.train.per_device_train_batch_size=0"], "must be positive"),
        (["--device", "v5e-1", "--rows=0"], "there must be at least one"),
        (["--device", "v5e-1", "--kernels"], "--kernels .* does not go with --no-compile"),
    ],
)
def test_a_mistake_is_one_line(given, said, capfd):
    words = ["plan", "--no-compile", "--config.model.path=smollm2-135m", *given]
    assert main(words) == 1
    captured = capfd.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tpu-tune: ") and not captured.out
    assert re.search(said, lines[0])


def test_json_has_the_promised_fields(capsys):
    words = ["plan", "--no-compile", "--json", "--config.model.path=smollm2-135m", "--device", "h100", "x2"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    for field in (
        "device",
        "num_devices",
        "peak_bytes_per_device",
        "capacity_bytes_per_device",
        "fits",
        "compiler",
        "breakdown",
    ):
        assert field in found
    assert (found["device"], found["num_devices"]) == ("h100 x2", 2)
    assert found["peak_bytes_per_device"] == sum(found["breakdown"].values())


# Compilers: absent, real, and too small a chip


@pytest.fixture
def no_compilers(tmp_path, monkeypatch):
    """An environment in which neither compiler can be found, as where neither is installed."""
    hide = tmp_path / "sitecustomize.py"
    hide.write_text(
        "import sys\nclass Hide:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('libtpu', 'jax_cuda13_plugin', 'jax_cuda12_plugin', 'jax_plugins'):\n"
        "            raise ModuleNotFoundError(name)\nsys.meta_path.insert(0, Hide())\n"
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name in ('libtpu', 'jax_cuda13_plugin', 'jax_cuda12_plugin')"
        " else find(name, package)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.parametrize("device, package", [("v3-8", "libtpu"), ("rtx4090", "cuda13")])
def test_without_a_compiler_bytes_are_counted_and_that_is_said(no_compilers, device, package):
    found = planning.plan(settings("smollm2-135m"), device)
    assert found["compiler"].startswith("none (") and package in found["compiler"]
    assert found["fits"] and found["breakdown"]["scratch"] > 0
    assert "estimate" in planning.table(found)


def test_what_cudnn_will_ask_for_is_counted():
    call = (
        "  %dot_product_attention_bwd.8 = (bf16[2,32,1024,128]{3,1,2,0}, bf16[2,8,1024,128]{3,1,2,0}, u8[0]{0}) "
        'custom-call(%q, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward", api_version=1\n'
    )
    assert compile_step.cudnn_workspace(call.replace("1024", "512") + call) == 4 * 2 * 32 * 1024 * 128
    assert compile_step.cudnn_workspace(call.replace("Backward", "")) == compile_step.cudnn_workspace("") == 0


def test_what_libtpu_says_of_too_large_a_program():
    first = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.04G) exceeds "
        "available HBM (15.75G)."
    )
    assert compile_step.too_large(first, 10**9) == {
        "peak": int(16.04 * 2**30) + 10**9,
        "capacity": int(15.75 * 2**30),
    }
    second = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.55G of 7.48G hbm. Exceeded hbm capacity by"
    )
    assert compile_step.too_large(second, 10**9) == {"peak": int(24.55 * 2**30), "capacity": int(7.48 * 2**30)}
    assert compile_step.too_large("RESOURCE_EXHAUSTED: hbm", 1) == {"peak": 0, "capacity": 0}


TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A directory with the config.json of two small layers; matrices are multiplied as a TPU does by default."""
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "default")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


def test_a_plan_touches_no_device_of_the_process_that_asks():
    # Were jax's backend started in it, it would look for this platform and fail, or take a TPU from a running job.
    words = [sys.executable, "-m", "tpu_tune", "plan", "--no-compile", "--json", "--device", "v3-8"]
    env = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run(
        [*words, "--config.model.path=smollm2-135m"], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}


@needs_libtpu
def test_the_real_step_compiles_for_a_chip(tiny):
    before = dict(os.environ)
    config = settings(tiny, data__max_length=512, train__eval_strategy="no")
    found = tpu_tune.plan(config, "v5e-1")
    assert dict(os.environ) == before
    assert found["compiler"].startswith("libtpu") and found["fits"]
    parts, estimate = found["breakdown"], counted(config, "v5e-1")["breakdown"]
    assert found["peak_bytes_per_device"] == sum(parts.values())
    for name in ("frozen", "trainable", "gradients", "optimizer", "batch"):
        assert parts[name] == estimate[name]
    assert 0 < parts["scratch"] < 20 * estimate["scratch"]
    time = found["step"]["time"]
    assert time["how"].startswith("by the compiler") and sum(time["kinds"].values()) == pytest.approx(time["seconds"])
    assert {"products", "attention", "elementwise"} <= set(time["kinds"]) and 0 < time["mfu"] < 1


@needs_libtpu
@pytest.mark.slow
def test_with_its_kernels_bundles_a_step_takes_about_as_long(tiny):
    config = settings(tiny, data__max_length=512, train__eval_strategy="no", model__remat="full")
    plain, full = (planning.plan(config, "v5e-1", kernels=asked)["step"]["time"] for asked in (False, True))
    assert full["how"] == "by the compiler with its kernels' bundles"
    assert 1 / 3 < plain["seconds"] / full["seconds"] < 3  # so small operations are all start and no work


@needs_libtpu
def test_too_large_for_a_chip_is_a_result(tiny, capsys):
    words = ["--config.data.max_length=2048", "--config.train.per_device_train_batch_size=4096"]
    words += ["--config.train.eval_strategy=no", "--config.model.attention=reference", "--config.train.max_steps=1"]
    assert main(["plan", "--device", "v5e-1", f"--config.model.path={tiny}", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["compiler"].startswith("libtpu")
    assert found["peak_bytes_per_device"] > found["capacity_bytes_per_device"] == int(15.75 * 2**30)


def test_a_compiler_that_dies_leaves_the_byte_count(monkeypatch):
    real = subprocess.run

    def run(words, input, **options):
        if json.loads(input)["compile"]:
            return subprocess.CompletedProcess(words, -9, "", "")
        return real(words, input=input, **options)

    monkeypatch.setattr(compile_process.subprocess, "run", run)
    found = planning.plan(settings("smollm2-135m"), "v5e-1")
    assert "killed by signal 9" in found["compiler"] and found["breakdown"]["frozen"] > 0


# Suggestions, and the check before training


def measured_by_rows(per_row, fixed):
    """A stand-in for the compiling process: a plan whose need is a straight line over the rows."""

    def run(job, kind, timeout=0.0):
        config = job["config"]
        bits = {"none": 16, "int8": 8, "int4": 4, "nf4": 4}[config["quantize"]["format"]]
        rows = config["train"]["per_device_train_batch_size"]
        frozen = int(fixed * bits / 4) // job["count"]
        within = int(per_row * rows * {"auto": 1, "full": 1, "dots": 4, "none": 20}[config["model"]["remat"]])
        within //= 4 if config["model"]["token_chunk_size"] else 1
        held = {"frozen": frozen, "trainable": 0, "optimizer": 0, "batch": 0}
        train = {"fits": True, "arguments": frozen, "peak": frozen + within, "host": 0}
        train["fits"] = train["peak"] <= 15.75 * 2**30
        return {
            "compiler": "libtpu" if job["compile"] else "",
            "why": "",
            "held": held,
            "gradients": 0,
            "train": train,
            "evaluate": train,
            "parameters": 1,
            "trainable": 1,
            "width": 2048,
            "encoder_width": 0,
            "rows": rows * config["train"]["gradient_accumulation_steps"],
            "mesh": {"data": 1, "fsdp": job["count"], "tensor": 1, "sequence": 1},
        }

    return run


@pytest.fixture
def straight_line(monkeypatch):
    module = importlib.import_module("tpu_tune.planning.figures")
    return lambda per_row, fixed: monkeypatch.setattr(module, "run_job", measured_by_rows(per_row, fixed))


def test_suggest_finds_the_largest_batch_in_few_compiles(straight_line):
    straight_line(0.5 * GB, 3.5 * GB)
    config = settings("llama-7b", quantize__format="none", train__per_device_train_batch_size=4)
    found = suggest(config, "v5e-1", max_compiles=8)
    # 3.5 GB in four bits is 14 GB in sixteen, beside which five rows fit: 16.5 of 16.91 GB.
    assert found["figures"]["peak_bytes_per_device"] == pytest.approx(16.5 * GB)
    assert found["overrides"] == {"train.per_device_train_batch_size": 5}
    assert found["compiles"] <= 8
    larger = suggest(settings("llama-7b", train__per_device_train_batch_size=64), "v5e-1", rows=1000)
    run = larger["figures"]["run"]
    assert (run["rows"], run["steps_per_epoch"]) == (1000, 20)  # 39 batches of 26, two a step
    assert larger["overrides"] == {"train.per_device_train_batch_size": 26, "train.gradient_accumulation_steps": 2}
    freer = larger["alternatives"][0]
    assert freer["overrides"]["model.remat"] == "none" and freer["figures"]["fits"] and larger["compiles"] <= 8


def test_suggest_takes_fewer_bits_where_it_must_and_says_what_would_do_where_nothing_does(straight_line):
    straight_line(0.5 * GB, 10 * GB)
    found = suggest(settings("llama-7b", quantize__format="none"), "v5e-1")
    assert found["overrides"]["quantize.format"] == "nf4"
    straight_line(0.5 * GB, 40 * GB)
    nothing = suggest(settings("llama-65b"), "v5e-1")
    # The bytes alone said so; two compiles went into the devices that may do.
    assert nothing["overrides"] is None and nothing["compiles"] == 2
    assert nothing["devices"][:2] == ["rtx6000ada-48g", "v2-8"] and "v5e-4" in nothing["devices"]
    assert nothing["compiled_device"] == "v2-8"  # the stand-in's chips all hold 15.75 GiB
    assert "rtx6000ada-48g, v2-8" in planning.advice(nothing)


def test_suggest_works_on_fewer_tokens_at_a_time_before_it_gives_up(straight_line):
    straight_line(8 * GB, 12 * GB)
    found = suggest(settings("llama-13b"), "v5e-1")
    assert found["overrides"] == {"model.token_chunk_size": 512, "train.per_device_train_batch_size": 2}
    assert found["figures"]["peak_bytes_per_device"] == pytest.approx(16 * GB)


def test_the_compiles_of_a_search_are_bounded(straight_line):
    straight_line(0.01 * GB, 1 * GB)
    found = suggest(settings("llama-7b"), "v5e-1", max_compiles=3)
    assert found["compiles"] <= 3 and found["figures"]["fits"]


def test_the_next_number_of_rows_lies_where_a_line_meets_the_capacity():
    def found(peak, fits):
        return {"peak_bytes_per_device": peak, "capacity_bytes_per_device": 17, "fits": fits}

    assert next_guess({1: found(3, True)}, 100) == 2
    assert next_guess({1: found(3, True), 2: found(5, True)}, 100) == 8
    assert next_guess({1: found(3, True), 2: found(5, True)}, 6) == 6
    assert next_guess({1: found(3, True), 2: found(4, True), 15: found(30, False)}, 100) == 8  # bent upwards
    assert next_guess({2: found(4, True), 10: found(None, False)}, 100) == 6
    assert next_guess({8: found(16, True), 9: found(19, False)}, 100) == 8  # nothing left to try


def test_overrides_read_as_the_command_line_takes_them():
    assert (
        planning.override_flags({"model.remat": "full", "mesh.fsdp": 8})
        == "--config.model.remat=full --config.mesh.fsdp=8"
    )


def train_words(tmp_path):
    model = write_tiny_llama(tmp_path / "tiny")
    rows = write_rows(tmp_path / "rows.jsonl")
    return [
        "train",
        "--config",
        str(_config_file(tmp_path, model, rows)),
        f"--config.output_dir={tmp_path / 'out'}",
        "--config.train.max_steps=1",
    ]


def _config_file(directory, model, rows):
    file = directory / "config.py"
    file.write_text(
        "from tpu_tune.config import default\n\ndef get_config():\n    c = default()\n"
        f"    c.model.path, c.data.train, c.data.cache_dir = {str(model)!r}, {str(rows)!r}, {str(directory)!r}\n"
        "    c.model.dtype, c.data.max_length, c.data.num_workers = 'float32', 32, 1\n    return c\n"
    )
    return file


def test_training_that_does_not_fit_stops_with_the_table(tmp_path, monkeypatch, straight_line, capsys):
    straight_line(100 * GB, 1 * GB)
    monkeypatch.setattr(planning, "local_device", lambda: planning.find_device("v5e-1"))
    assert main(train_words(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "DOES NOT FIT" in said and "frozen weights" in said and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("tpu-tune: this job does not fit v5e-1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["on a CPU", "in a run that has checkpoints"])
def test_training_asks_nobody(tmp_path, monkeypatch, where):
    def plan(*_):
        raise AssertionError("a plan was made")

    monkeypatch.setattr(planning, "plan", plan)
    if where != "on a CPU":
        monkeypatch.setattr(planning, "local_device", lambda: planning.find_device("v5e-1"))
        (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    check_memory(settings("llama-7b", output_dir=str(tmp_path)))


@pytest.mark.parametrize("error", [RuntimeError("no room for a process"), UserError("no such model")])
def test_a_check_that_fails_does_not_stop_training(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(planning, "local_device", lambda: planning.find_device("v5e-1"))

    def plan(*_):
        raise error

    monkeypatch.setattr(planning, "plan", plan)
    with caplog.at_level("INFO", "tpu_tune"):
        check_memory(settings("llama-7b", output_dir=str(tmp_path)))
    # A user's mistake is left to training, which names it better.
    assert ("could not be checked beforehand" in caplog.text) == (not isinstance(error, UserError))


def test_the_evaluation_counts_too():
    measured = measured_by_rows(GB, GB)(
        {"config": configuration.to_dict(settings("llama-7b")), "count": 1, "compile": True}, "tpu"
    )
    measured["evaluate"] = {"fits": False, "peak": 0, "arguments": 0}
    device = planning.find_device("v5e-1")
    found = figures(settings("llama-7b"), device, architecture(PRESETS["llama-7b"]), measured, None, True)
    assert not found["fits"] and "per_device_eval_batch_size" in found["notes"][0]
    assert "training would" in planning.table(found)
