"""A tiny random Llama on disk, rows to train it on, and the few lines that set a run up without the loop.

Everything random comes from `numpy.random.RandomState`, whose streams NumPy promises never to change, so that stored
losses stay true. Importing this before jax matters nowhere: `conftest.py` has set the environment.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from tpu_tune import config as configuration
from tpu_tune.checkpoints.run_checkpoints import RunCheckpoints
from tpu_tune.checkpoints.run_directory import MetricsFile, RunDirectory
from tpu_tune.training.prepare_model import PreparedModel, prepare_model
from tpu_tune.training.prepare_steps import Steps, prepare_steps
from tpu_tune.training.result import write_result
from tpu_tune.training.step import TrainState
from tpu_tune.transforms import sharding

IGNORED = -100
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "torch_dtype": "float32",
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "bos_token_id": 257, "eos_token_id": 256,
}  # fmt: skip


def write_tiny_llama(directory: pathlib.Path, seed: int = 0, **overrides: Any) -> pathlib.Path:
    """Write config.json, model.safetensors and a byte-level tokenizer of 258 tokens; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**TINY, **overrides}
    (directory / "config.json").write_text(json.dumps(config))
    random = np.random.RandomState(seed)
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]

    def matrix(out: int, inn: int, scale: float = 1.0) -> np.ndarray:
        return (random.randn(out, inn) * scale / np.sqrt(inn)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocabulary, width, scale=1.0)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, out, inn in (
            ("self_attn.q_proj", q, width),
            ("self_attn.k_proj", kv, width),
            ("self_attn.v_proj", kv, width),
            ("self_attn.o_proj", width, q),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            tensors[f"{at}{name}.weight"] = matrix(out, inn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = (1 + 0.1 * random.randn(width)).astype(np.float32)
    tensors["model.norm.weight"] = (1 + 0.1 * random.randn(width)).astype(np.float32)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocabulary, width)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: pathlib.Path) -> None:
    """Byte-level BPE without merges: one token a byte, then the end and the start of a text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's bytes_to_unicode
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    special = [
        {
            "id": number,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for number, text in ((256, "</s>"), (257, "<s>"))
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "merges": [],
            "vocab": {**{letters[byte]: byte for byte in range(256)}, "</s>": 256, "<s>": 257},
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 256,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(words))


def write_rows(file: pathlib.Path, count: int = 40, seed: int = 0) -> pathlib.Path:
    """Write prompt/completion rows of ragged lengths."""
    random = np.random.RandomState(seed)
    words = "a tiny model reads some words and learns to say what comes next in them".split()

    def text(least: int, most: int) -> str:
        return " ".join(random.choice(words) for _ in range(random.randint(least, most)))

    rows = [{"prompt": text(1, 4) + "? ", "completion": text(1, 6) + "."} for _ in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_config(**keys: Any) -> Any:
    """Return the defaults with dotted keys, double underscores for dots: train__learning_rate=1e-3."""
    config = configuration.default()
    for key, value in keys.items():
        configuration.assign(config, key.replace("__", "."), value)
    return configuration.check(config)


def prepare(
    config: Any, total_steps: int, devices: int = 1, initial: Mapping[str, np.ndarray] | None = None
) -> tuple[PreparedModel, Steps]:
    """Load the model on the first `devices` devices and build its steps.

    Args:
      config: whose `mesh` has to fit `devices`.
      total_steps: the schedule's length.
      devices: how many of the virtual devices.
      initial: trainable leaves to start from instead of fresh ones.
    """
    model = prepare_model(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))
    if initial is not None:
        assert set(initial) == set(model.trainable)
        leaves = {path: jax.device_put(initial[path], leaf.sharding) for path, leaf in model.trainable.items()}
        model = dataclasses.replace(model, trainable=leaves)
    return model, prepare_steps(config, model, total_steps)


def write_stopped_run(
    config: Any, losses: Mapping[int, float], reference: pathlib.Path | None = None, seed: int = 1
) -> None:
    """Write the run directory of a run that was stopped: random weights, a checkpoint for each step of `losses`.

    Args:
      config: the run's configuration.
      losses: step -> eval_loss.
      reference: where training's own writer puts the result that the run would have had at each step, `STEP/`.
      seed: of the weights.
    """
    model, steps = prepare(config, 2 * max(losses))
    run = RunDirectory(config.output_dir)
    run.write_config(config)
    metrics = MetricsFile(run)
    random = np.random.RandomState(seed)
    with RunCheckpoints(run.checkpoints, model.fingerprint(config)) as checkpoints:
        for step, loss in losses.items():
            trainable = {
                path: jax.device_put(leaf + random.randn(*leaf.shape).astype(np.float32) / 8, leaf.sharding)
                for path, leaf in steps.initial_state.trainable.items()
            }
            state = dataclasses.replace(steps.initial_state, trainable=trainable, step=jax.numpy.int32(step))
            metrics.append({"step": step, "epoch": step / 10, "loss": loss, "learning_rate": 1e-3, "num_tokens": step})
            metrics.append({"step": step, "epoch": step / 10, "eval_loss": loss, "eval_perplexity": 9.0})
            checkpoints.save(step, state, {"best_step": min(losses, key=losses.get)})
            if reference is not None:
                write_result(config, model, state, str(reference / str(step)))
    run.update_summary({"total_steps": 2 * max(losses), "vocab_size": 264})


def documents(vocabulary: int, shortest: int, longest: int, count: int, seed: int) -> list[np.ndarray]:
    """Return documents of ragged lengths whose next token can partly be learned."""
    random = np.random.RandomState(seed)
    found = []
    for _ in range(count):
        tokens = random.randint(0, vocabulary, random.randint(shortest, longest + 1))
        tokens[1::2] = (tokens[0:-1:2] * 3 + 7) % vocabulary  # every other token follows from the one before it
        found.append(tokens)
    return found


def rows_of(packed: Sequence[Sequence[np.ndarray]], width: int) -> dict[str, np.ndarray]:
    """Return (rows, width) arrays; each row holds the documents given for it, one after the other."""
    shape = (len(packed), width)
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "positions", "segment_ids")}
    batch["targets"] = np.full(shape, IGNORED, np.int32)
    for row, held in enumerate(packed):
        at = 0
        for segment, tokens in enumerate(held, start=1):
            end = at + len(tokens)
            batch["input_ids"][row, at:end] = tokens
            batch["targets"][row, at : end - 1] = tokens[1:]
            batch["positions"][row, at:end] = np.arange(len(tokens))
            batch["segment_ids"][row, at:end] = segment
            at = end
    return batch


def window(rows: dict[str, np.ndarray], accumulation: int) -> dict[str, np.ndarray]:
    """Cut (rows, T) arrays into (accumulation, rows / accumulation, T)."""
    return {name: array.reshape(accumulation, -1, array.shape[-1]) for name, array in rows.items()}


def run_steps(
    model: PreparedModel, steps: Steps, batches: Iterable[Mapping[str, np.ndarray]], state: TrainState | None = None
) -> tuple[TrainState, list[dict[str, float]]]:
    """Take a step for every batch; return the last state and each step's metrics."""
    state, rows = steps.initial_state if state is None else state, []
    for batch in batches:
        state, metrics = steps.train(state, model.frozen, steps.put_batch(batch, 1))
        rows.append({name: float(value) for name, value in jax.device_get(metrics).items()})
    return state, rows


def command(config: Any, directory: pathlib.Path, devices: int = 1, *extra: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment that train `config` in a process of its own on `devices` devices."""
    file = directory / "config_file.py"
    values = json.dumps(configuration.to_dict(config))
    file.write_text(
        "import json\nfrom tpu_tune import config\n\n"
        f"def get_config():\n    return config.from_dict(json.loads({values!r}))\n"
    )
    flags = " ".join(word for word in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in word)
    flags += (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compiles five times faster
    )
    env = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
    }
    return [sys.executable, "-m", "tpu_tune", "train", "--config", str(file), *extra], env


def train_process(
    config: Any, directory: pathlib.Path, devices: int = 1, *extra: str, **options: Any
) -> subprocess.CompletedProcess:
    """Run `command` to its end."""
    words, env = command(config, directory, devices, *extra)
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, **options)


def metric_rows(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in pathlib.Path(output_dir, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "eval_runtime")} for row in rows]
