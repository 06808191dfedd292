"""Perplexity of a model on one real text, with its linear weights stored in each of our formats, as a Markdown table.

    python benchmarks/quantized_perplexity.py                  # SmolLM2-135M-Instruct
    python benchmarks/quantized_perplexity.py --model gemma    # Gemma 3 270M

The text is the start of the Brown corpus, its words put together as they were printed; it is cut into windows of 512
tokens which are scored apart, every token but a window's first (which is BOS where the tokenizer begins texts with
one). All arithmetic is float32, so that rows differ by their weights alone. Bits per byte divide the summed loss by the
bytes of the whole text. Calibrated rows are rounded as `quantize.calibration` does it, against windows of the text that
follows the scored one. Models and text come through `launch/fetch.py`, once a machine.

Both files' weights are four-bit already (GGUF Q4_1 and Q4_K_M): the rows below the first measure what a second
rounding, on another grid, adds. Against a model's original weights the losses of the four-bit formats are smaller than
they look here. `--rotate` (of a Llama) measures a first rounding: the hidden states are turned by a random orthogonal
matrix, which every matrix of the model takes in (QuaRot, arXiv:2404.00456, section 3.2). The logits stay what they are,
and no weight is on the file's grid any more. `--rotate DIR` keeps that model, to train it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "launch"))

# name -> (storage dtype of what is not quantized, `quantize.*` settings)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "file's own, as float32": ("float32", {"format": "none"}),
    "bfloat16": ("bfloat16", {"format": "none"}),
    "int8": ("float32", {"format": "int8"}),
    "int4, 15 levels (before)": ("float32", {"format": "int4", "double_quant": False, "symmetric": True}),
    "int4": ("float32", {"format": "int4", "double_quant": False}),
    "nf4": ("float32", {"format": "nf4", "double_quant": False}),
    "int4, double quantized": ("float32", {"format": "int4"}),
    "nf4, double quantized": ("float32", {"format": "nf4"}),
    "int4, double quantized, calibrated": ("float32", {"format": "int4", "calibration": 1}),
    "nf4, double quantized, calibrated": ("float32", {"format": "nf4", "calibration": 1}),
}


def brown_text(folder: pathlib.Path, characters: int) -> str:
    """Return the first characters of Brown: the files in order, tags taken off, punctuation and quotes put back."""
    words: list[str] = []
    length = 0
    for path in sorted(folder.glob("c[a-r][0-9][0-9]")):
        for item in path.read_text(encoding="latin-1").split():
            words.append(item.rsplit("/", 1)[0])
            length += len(words[-1]) + 1
        if length > 1.2 * characters:
            break
    text = re.sub(r" ([.,;:?!])", r"\1", " ".join(words))
    return text.replace("`` ", '"').replace(" ''", '"')[:characters]


def windows(tokens: list[int], size: int, bos: list[int]) -> tuple[Any, Any]:
    """Return (input_ids, targets), both (windows, size) int32: targets are -100 where nothing is to be predicted.

    Each window begins with `bos`, which holds one token or none.
    """
    import numpy as np

    room = size - len(bos)
    count = -(-len(tokens) // room)
    ids, targets = np.zeros((count, size), np.int32), np.full((count, size), -100, np.int32)
    for row in range(count):
        part = bos + tokens[row * room : (row + 1) * room]
        ids[row, : len(part)] = part
        targets[row, : len(part) - 1] = part[1:]
    return ids, targets


def encode(source: Any, text: str, size: int) -> tuple[Any, Any]:
    """Return the text's `windows`, with BOS where the model's tokenizer begins texts with one."""
    tokenizer = source.load_tokenizer()
    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    return windows(tokenizer(text, add_special_tokens=False)["input_ids"], size, bos)


def file_bits(path: str) -> tuple[int, float]:
    """Return (bytes, bits a weight) of the linear layers as a .gguf file stores them."""
    import gguf

    linear = [t for t in gguf.GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    size = sum(int(t.n_bytes) for t in linear)
    return size, 8 * size / sum(int(t.n_elements) for t in linear)


def calibrated_source(source: Any, arch: Any, quantization: Any, windows: tuple[Any, Any], note: Any) -> Any:
    """Return the source with its matrices rounded against the windows."""
    import numpy as np

    from tpu_tune.checkpoints.calibrated import with_calibrated
    from tpu_tune.training.calibration import Calibration

    ids, targets = windows
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    real = np.concatenate([np.ones_like(ids[:, :1]), targets[:, :-1] != -100], axis=1).astype(np.int32)
    folder = tempfile.mkdtemp(prefix="calibrated-")
    Calibration(source, arch, quantization, "float32", folder, "benchmark", "").run((ids, places, real), note)
    return with_calibrated(source, arch, folder, "benchmark")


def rotated(source: Any, folder: str) -> Any:
    """Return a Llama's source as one of the same logits, its hidden states turned; files are written to the folder."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    from tpu_tune.checkpoints.params import load_params
    from tpu_tune.checkpoints.source import open_source
    from tpu_tune.models import architecture
    from tpu_tune.transforms import QuantizeConfig

    arch = architecture(source.config)
    params = load_params(source, arch, jnp.float32, QuantizeConfig(format="none"))
    weights = {path: np.asarray(leaf, np.float64) for path, leaf in params.items()}
    size = arch.hidden_size
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0]
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    embedding = weights["model.embed_tokens.weight"]
    tensors = {
        "model.embed_tokens.weight": embedding @ turn,
        "lm_head.weight": embedding * weights["model.norm.weight"] @ turn,
        "model.norm.weight": np.ones(size),
    }
    for module in arch.modules():
        for layer in module.layers:
            part = weights[module.weight][layer]
            if module.kind == "norm":
                part = np.ones(size)
            elif module.shape[1] == size and module.path.endswith(("o_proj", "down_proj")):
                part = turn.T @ part.T
            else:
                norm = norms[module.path.split(".")[2]]
                part = (turn.T @ (weights[f"model.layers.{norm}.weight"][layer][:, None] * part)).T
            tensors[f"{module.name(layer)}.weight"] = part
    save_file(
        {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()},
        os.path.join(folder, "model.safetensors"),
    )
    config = {**source.config, "tie_word_embeddings": False, "torch_dtype": "float32"}
    pathlib.Path(folder, "config.json").write_text(json.dumps(config))
    source.load_tokenizer().save_pretrained(folder)
    return open_source(folder)


def measure(
    source: Any,
    ids: Any,
    targets: Any,
    variant: tuple[str, dict[str, Any]],
    batch: int,
    calibration: tuple[Any, Any] | None = None,
) -> dict[str, float]:
    """Load the weights one way and score the windows; `calibration`: (ids, targets) of the windows to round against.

    Returns:
      `loss` (summed, nats), `tokens` (scored), `bytes` (of the linear weights) and `bits` (a weight).
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tpu_tune.checkpoints.params import load_params
    from tpu_tune.models import Execution, architecture
    from tpu_tune.training.objectives import CrossEntropy
    from tpu_tune.training.step import ModelLoss, make_eval_step
    from tpu_tune.transforms import FULL, QuantizeConfig, quantized_paths

    dtype, settings = variant
    arch = architecture(source.config)
    quantization = QuantizeConfig(**settings)
    if quantization.calibration:
        source = calibrated_source(source, arch, quantization, calibration, lambda line: None)
    params = load_params(source, arch, jnp.dtype(dtype), quantization)
    step = jax.jit(make_eval_step(ModelLoss(arch, Execution(jnp.float32), FULL, CrossEntropy(256))))
    loss = tokens = 0
    for start in range(0, len(ids), batch):
        rows = [
            np.pad(part[start : start + batch], ((0, max(0, start + batch - len(ids))), (0, 0)), constant_values=fill)
            for part, fill in ((ids, 0), (targets, -100))
        ]
        places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), rows[0].shape)
        sums = step(
            params,
            {},
            {"input_ids": rows[0], "targets": rows[1], "positions": places, "segment_ids": np.ones_like(rows[0])},
        )
        batch_loss, batch_tokens = sums["loss"]
        loss, tokens = loss + float(batch_loss), tokens + int(batch_tokens)
    linear = quantized_paths(arch.modules(), QuantizeConfig("int8"))
    size = sum(params[path].nbytes for path in linear)
    weights = sum((len(m.layers) or 1) * math.prod(m.shape) for m in arch.modules() if m.weight in linear)
    return {"loss": loss, "tokens": tokens, "bytes": size, "bits": 8 * size / weights}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = [
        "| linear weights | perplexity | bits per byte | bytes of the linear weights | bits a weight |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['perplexity']:.3f} | {row['bits_per_byte']:.4f} "
        f"| {row['bytes'] / 1e6:.1f} MB | {row['bits']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="base", help="base (the quickstart's), gemma, a .gguf file or a Hugging Face directory"
    )
    parser.add_argument("--brown", default="", help="folder of the Brown corpus' files; default: fetched")
    parser.add_argument("--characters", type=int, default=16_000, help="how much of the text to score")
    parser.add_argument("--window", type=int, default=512, help="tokens that are scored together")
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--calibration", type=int, default=64, help="windows of further text to calibrate on")
    parser.add_argument("--only", default="", help="the rows whose name matches this regular expression")
    parser.add_argument(
        "--rotate",
        nargs="?",
        const="",
        metavar="DIR",
        help="of a Llama: leave the file's grid, as said above; kept in DIR",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()

    import fetch

    from tpu_tune.checkpoints.source import open_source

    model = options.model
    if model in ("base", "gemma"):
        model = str(next(fetch.fetch(model).glob("*.gguf")))
    brown = pathlib.Path(options.brown) if options.brown else fetch.fetch("brown")
    more = options.characters + 8 * options.window * options.calibration
    text, rest = brown_text(brown, options.characters), brown_text(brown, more)[options.characters :]
    source = open_source(model)
    if options.rotate is not None:
        folder = options.rotate or tempfile.mkdtemp(prefix="rotated-")
        os.makedirs(folder, exist_ok=True)
        source = rotated(source, folder)
    ids, targets = encode(source, text, options.window)
    calibration = tuple(part[: options.calibration] for part in encode(source, rest, options.window))
    size = len(text.encode())
    note = functools.partial(print, file=sys.stderr, flush=True)
    note(f"{len(text)} characters, {size} bytes, {len(ids)} windows of {options.window}")
    rows = []
    chosen = {name: variant for name, variant in VARIANTS.items() if re.search(options.only, name)}
    for name, variant in chosen.items():
        begun = time.monotonic()
        found = measure(source, ids, targets, variant, options.batch, calibration)
        if variant == VARIANTS["file's own, as float32"] and model.endswith(".gguf") and options.rotate is None:
            found["bytes"], found["bits"] = file_bits(model)
        mean = found["loss"] / found["tokens"]
        rows.append(
            {"name": name, "perplexity": math.exp(mean), "bits_per_byte": found["loss"] / math.log(2) / size, **found}
        )
        note(f"{name}: perplexity {rows[-1]['perplexity']:.3f}, {time.monotonic() - begun:.0f} s")
    if options.json:
        print(json.dumps({"model": os.path.basename(model), "text_bytes": size, "rows": rows}))
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
