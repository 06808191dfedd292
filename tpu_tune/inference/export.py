"""From a run to files that others read: the PEFT adapter, a merged model (Hugging Face or GGUF), or the adapter's base.

There are two schools of merging a QLoRA adapter: into the original weights, as peft's own advice goes, or into the
dequantized ones it was trained over, which is exact to training. Both are offered, the original by default, and the
difference in logits from the trained model is measured and reported; nothing is requantized silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tpu_tune.checkpoints import peft, storage
from tpu_tune.checkpoints.gguf_write import check_family, write_gguf
from tpu_tune.checkpoints.huggingface_write import stored_dtype, tensors_with_head, write_model
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.towers import as_text_model, text_names
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.inference.difference import logits_differ
from tpu_tune.inference.model import logits
from tpu_tune.inference.run_result import (
    Step,
    open_base,
    read_own_adapter,
    result_of,
    says_how_taught,
    trained_over,
    write_result,
)
from tpu_tune.models import Architecture
from tpu_tune.tensors import dense
from tpu_tune.transforms import QuantizeConfig, find_targets, unties_head

_PROBE_TOKENS = 64
_GGUF_DTYPES = {"f16": "float16", "bf16": "bfloat16"}  # of types that are roundings


def export_result(run: str, output: str, step: Step = None) -> str:
    """Write what a run has trained, as it is: its PEFT adapter, or of one that trained every weight the model.

    Args:
      run: run directory.
      output: directory to write.
      step: a checkpoint's (see `run_result.find_step`); by default what the run ended with.

    Returns:
      The run's method: lora | full.

    Raises:
      UserError: the run has neither yet, or there is something at `output` already.
    """
    directory = RunDirectory(run)
    config = directory.config()
    check_output(output)
    write_result(directory, config, step, output)
    return config.method


def export_merged(run: str, output: str, base: str = "original", dtype: str = "", step: Step = None) -> dict[str, Any]:
    """Write a run's model with its adapter merged in; return figures.

    Args:
      run: run directory.
      output: directory to write.
      base: original | dequantized.
      dtype: the tensors' dtype; by default the original's, float32 from a GGUF.
      step: a checkpoint's (see `run_result.find_step`); by default what the run ended with.

    Returns:
      `max_logit_difference` (largest absolute difference from the model as it was trained, over one probe text),
      `relative_logit_difference` (the same over the largest logit), `same_first_guesses` (share of positions).

    Raises:
      UserError: what was written is not the merged model, by more than rounding.
    """
    directory = RunDirectory(run)
    config = directory.config()
    check_output(output)
    if config.method != "lora" and not dtype:
        write_result(directory, config, step, output)
        return {"max_logit_difference": 0.0, "relative_logit_difference": 0.0, "same_first_guesses": 1.0}
    source, arch, load_tree = _trained(directory, config, step)
    source = says_how_taught(source, directory)
    return _written_and_measured(
        output,
        arch,
        load_tree,
        base,
        lambda params: write_model(output, params, source, arch, dtype),
        dtype or stored_dtype(source.config),
    )


def export_gguf(run: str, output: str, base: str = "original", kind: str = "f16", step: Step = None) -> dict[str, Any]:
    """Write a run's model, its adapter merged in, as one GGUF file; return figures as `export_merged` does.

    Args:
      run: run directory, of any method.
      output: file to write, `NAME.gguf`.
      base: original | dequantized; without meaning for a run that trained every weight.
      kind: the number format of the matrices, one of `gguf_mixtures.FORMATS`.
      step: a checkpoint's (see `run_result.find_step`); by default what the run ended with.

    Raises:
      UserError: a family of which no GGUF is written, or GGUF cannot express the model or its tokenizer.
    """
    directory = RunDirectory(run)
    config = directory.config()
    if not output.endswith(".gguf"):
        raise UserError(f"--output is {output}; a GGUF file's name ends with .gguf")
    check_output(output)
    source, arch, load_tree = _trained(directory, config, step)
    text = says_how_taught(
        as_text_model(source), directory
    )  # llama.cpp has the other parts of a multimodal model in a file of their own
    check_family(text.config)

    def write(params: dict[str, Any]) -> None:
        untied = unties_head(params, arch.modules())
        write_gguf(output, text_names(tensors_with_head(params, arch, untied), arch), text, kind, untied)

    return _written_and_measured(output, arch, load_tree, base, write, _GGUF_DTYPES.get(kind, ""))


def _trained(
    run: RunDirectory, config: ConfigDict, step: Step
) -> tuple[WeightSource, Architecture, Callable[[bool], dict[str, Any]]]:
    """What a run's model is made of: a source, its architecture, and what loads the tree.

    The source of a LoRA run is its base, and the tree has the adapter over the quantized base or the plain one.
    """
    if config.method != "lora":
        source = open_source(result_of(run, config, step))
        arch = open_architecture(source)
        return source, arch, lambda quantized: load_params(source, arch, jnp.float32)
    source = open_base(run, config)
    arch, quantization = open_architecture(source), QuantizeConfig(**config.quantize)
    result = result_of(run, config, step)

    def load_tree(quantized: bool) -> dict[str, Any]:
        stored = trained_over(run, config, source) if quantized else source
        params = load_params(stored, arch, jnp.float32, quantization if quantized else None)
        spec, adapters = read_own_adapter(run, config, result, arch) if quantized else peft.read_adapter(result, arch)
        targets = find_targets(arch.modules(), spec, arch.default_targets)
        return targets.combine(*targets.split(params, adapters))

    return source, arch, load_tree


def _written_and_measured(
    output: str,
    arch: Architecture,
    load_tree: Callable[[bool], dict[str, Any]],
    base: str,
    write: Callable[[dict[str, Any]], None],
    rounded_to: str,
) -> dict[str, Any]:
    """Write a tree, read it back, and compare its logits on one probe text with those of the tree as it was trained.

    Where nothing but `rounded_to` lies between the tree and its files ("" where more does), their weights are held
    against each other too.

    Raises:
      UserError: they are not the same but for rounding; the files stay.
    """
    # One tree at a time: the trained one gives the reference logits, then the exported one is written and measured.
    probe = jnp.asarray(np.random.default_rng(0).integers(0, arch.vocab_size, (1, _PROBE_TOKENS)), jnp.int32)

    def probed(architecture: Architecture, params: dict[str, Any]) -> np.ndarray:
        return np.asarray(logits(architecture, jnp.dtype("float32"), params, *[probe] * (2 if arch.encoder else 1)))

    tree = load_tree(True)
    reference = probed(arch, tree)
    if base != "dequantized":
        del tree
        tree = load_tree(False)
    write(tree)
    exported = open_source(output)
    written_arch = open_architecture(exported)
    if rounded_to:
        _check_written(output, tree, lambda place: load_params(exported, written_arch, place=place), rounded_to)
    del tree
    measured = probed(written_arch, load_params(exported, written_arch))
    difference, relative = logits_differ(reference, measured)
    return {
        "max_logit_difference": difference,
        "relative_logit_difference": relative,
        "same_first_guesses": float(np.mean(measured.argmax(-1) == reference.argmax(-1))),
    }


def _check_written(
    output: str, tree: dict[str, Any], read: Callable[[Callable[[str, Any], None]], Any], dtype: str
) -> None:
    """Refuse files whose weights are not the tree's, rounded to `dtype` or as they are; one leaf is read at a time.

    Merging twice may round a number in a thousand to its other neighbour. A leaf that the tree has in another shape (a
    padded vocabulary) or not at all (a head that was tied) is left to the logits.

    Raises:
      UserError: with the numbers.
    """

    def compare(path: str, leaf: Any) -> None:
        if path not in tree:
            return
        found, wrong = np.asarray(leaf), 0
        for at in range(len(found)) if found.ndim > 2 else [...]:  # layer by layer: merging takes room
            own = jax.tree.map(lambda part, at=at: part[at], tree[path])
            wrong += _wrong(found[at], np.asarray(dense(own)), dtype)
        if wrong > found.size / 1000:
            raise UserError(
                f"{output} does not hold the merged model: read back, {wrong} of the {found.size} numbers of {path} "
                f"are not those that were merged, rounded to {dtype}; do not use it, and report this"
            )

    read(compare)


def _wrong(found: np.ndarray, own: np.ndarray, dtype: str) -> int:
    if found.shape != own.shape:
        return 0
    rounded = own.astype(jnp.dtype(dtype)).astype(np.float32)
    return int(np.sum((found != rounded) & (np.abs(found - own) > 1e-6 * (1 + np.abs(own)))))


def export_base(run: str, output: str, base: str = "dequantized", dtype: str = "") -> None:
    """Write the base model that PEFT should load below a run's adapter.

    Args:
      run: run directory.
      output: directory to write.
      base: dequantized (what the adapter was trained over) | original.
      dtype: the tensors' dtype; by default the original's, float32 from a GGUF.
    """
    check_output(output)
    directory = RunDirectory(run)
    config = directory.config()
    source = open_base(directory, config)
    arch = open_architecture(source)
    quantization = QuantizeConfig(**config.quantize) if base == "dequantized" else None
    stored = trained_over(directory, config, source) if quantization else source
    write_model(output, load_params(stored, arch, jnp.float32, quantization), source, arch, dtype)


def check_output(output: str) -> None:
    """Refuse to replace what is there: it may be anything, the run itself too."""
    there = storage.exists(output) or os.path.islink(output)
    if there and not (storage.is_dir(output) and not storage.list_names(output)):
        raise UserError(f"{output} is there already; choose another --output, or remove it first")
