"""Embeddings of texts: the mean of a model's last hidden states over each text's tokens.

Texts come in windows and leave as one array a window, so that any number of them fits. Within a window they are sorted
by length into batches of a few widths, each compiled once; every device takes its share of a batch's rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tpu_tune.errors import UserError
from tpu_tune.inference.model import Model
from tpu_tune.kernels import quantized_matmul
from tpu_tune.kernels.attention import for_device
from tpu_tune.models import Architecture, Decoder, Execution, encode
from tpu_tune.transforms import sharding

MAX_LENGTH = 512  # tokens of a text that are read
BATCH_TOKENS = 8192  # tokens of a batch, padding included
_NARROWEST = 32  # tokens; the widths are this times powers of two, up to the longest
_MOST_CHARACTERS = 20  # a token; what is longer is not tokenized at all


def embed(
    model: Model,
    windows: Iterable[Sequence[str]],
    max_length: int = MAX_LENGTH,
    batch_tokens: int = BATCH_TOKENS,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[Float[np.ndarray, "n d"]]:
    """Yield the embeddings of each window of texts, (texts, width) float32, in their order.

    An embedding is the mean over the text's own tokens (no special ones are added: the state of a leading BOS is the
    same for every text) of what the head reads, after the last norm; of an encoder-decoder, of the encoder's output. A
    text without tokens is all zeros.

    Args:
      model: loaded; its weights are held whole on every device.
      windows: texts, some thousands at a time.
      max_length: tokens that are read of each text; at most as many as a model with learned positions has.
      batch_tokens: tokens in a batch on all devices, padding included.
      devices: the devices to use; by default all, but of a CPU's virtual ones the first: they share its cores.

    Raises:
      UserError: `max_length` is less than one.
    """
    arch = model.architecture.encoder or model.architecture
    if max_length < 1:
        raise UserError(f"max_length is {max_length}; it must be at least 1")
    if arch.names.positions:
        max_length = min(max_length, arch.max_positions)
    devices = list(devices or (jax.devices()[:1] if jax.default_backend() == "cpu" else jax.devices()))
    mesh = Mesh(np.asarray(devices), ("data",))
    params = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()))
    run = functools.partial(_pooled, model.architecture, model.dtype, mesh, params)
    waiting = None
    for texts in windows:
        started = _dispatched(run, _tokens(model.tokenizer, texts, max_length), max_length, batch_tokens, len(devices))
        if waiting is not None:  # fetched while the devices work on this window
            yield _gathered(*waiting)
        waiting = started, len(texts)
    if waiting is not None:
        yield _gathered(*waiting)


def _tokens(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    if not texts:
        return []
    short = [text[: _MOST_CHARACTERS * max_length] for text in texts]
    plain = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return [ids[:max_length] for ids in tokenizer(short, add_special_tokens=False, **plain)["input_ids"]]


def _dispatched(
    run: Any, texts: list[list[int]], max_length: int, batch_tokens: int, devices: int
) -> list[tuple[np.ndarray, Array]]:
    """Start the batches of a window; return (their texts' numbers, their embeddings) of each."""
    order = np.argsort([len(ids) for ids in texts], kind="stable")
    started, begin = [], 0
    while begin < len(order):
        # The widest that is needed comes last; a batch is as wide as the longest text that still fits into it.
        width = _width(len(texts[order[begin]]), max_length)
        rows = max(1, batch_tokens // (width * devices)) * devices
        numbers = [number for number in order[begin : begin + rows] if len(texts[number]) <= width]
        ids, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row, number in enumerate(numbers):
            lengths[row] = len(texts[number])
            ids[row, : lengths[row]] = texts[number]
        started.append((np.asarray(numbers), run(ids, lengths)))
        begin += len(numbers)
    return started


def _width(length: int, max_length: int) -> int:
    return min(max(_NARROWEST, 1 << max(length - 1, 0).bit_length()), max_length)


def _gathered(batches: list[tuple[np.ndarray, Array]], count: int) -> Float[np.ndarray, "n d"]:
    parts = [np.asarray(embeddings)[: len(numbers)] for numbers, embeddings in batches]
    out = np.zeros((count, parts[0].shape[1] if parts else 0), np.float32)
    for (numbers, _), part in zip(batches, parts, strict=True):
        out[numbers] = part
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pooled(
    arch: Architecture, dtype: Any, mesh: Mesh, params: dict[str, Any], ids: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Float[Array, "B D"]:
    device = mesh.devices.flat[0]
    # Every device runs its rows as if it were alone.
    plan = quantized_matmul.for_device("auto", sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), [device]))
    how = Execution(dtype, for_device("auto", device, dtype, packed=False), plan=plan, packed=False)

    def local(params: dict[str, Any], ids: Array, lengths: Array) -> Array:
        real = jnp.arange(ids.shape[1]) < lengths[:, None]
        segments = real.astype(jnp.int32)
        if arch.encoder:
            hidden = encode(arch, params, how, ids, segments).hidden
        else:
            hidden, _ = Decoder(arch, params, how).hidden(ids, None, segments)
        total = jnp.sum(hidden.astype(jnp.float32) * real[:, :, None], axis=1)
        return total / jnp.maximum(lengths, 1)[:, None].astype(jnp.float32)

    replicated, rows = PartitionSpec(), PartitionSpec("data")
    each = jax.shard_map(local, mesh=mesh, in_specs=(replicated, rows, rows), out_specs=rows, check_vma=False)
    return each(params, ids, lengths)
