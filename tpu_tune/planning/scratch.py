"""What a step needs beside all that is held between steps, estimated from shapes, for where no compiler says it.

A sum of the large arrays that live at one time, each counted by hand: what remat keeps of every layer, one layer's own
arrays with their gradients, the attention's scores, one chunk of logits. It is meant to be within a third of what the
compilers say (one row of 2,048 tokens in nf4, in November 2026: LLaMA-7B 1.27 GB here, 1.34 by CUDA's for an RTX 3090;
33B 2.91 here, 2.72 there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from tpu_tune.kernels.attention import chosen
from tpu_tune.kernels.blockwise import BLOCK
from tpu_tune.models import Architecture
from tpu_tune.training.execution import loss_chunk, token_chunk

_FLOAT32 = 4


def score_bytes(arch: Architecture, rows: int, queries: int, keys: int, implementation: str, copies: int) -> int:
    """Return the bytes of attention scores (float32) that exist at one time, in one layer.

    Args:
      arch: of the model.
      rows: sequences on the device.
      queries, keys: tokens of each that meet.
      implementation: reference holds all scores; any other those of a block of queries and one of keys.
      copies: of the scores that live at one time: scores and weights, and in training their gradient.
    """
    if implementation != "reference":
        queries, keys = min(queries, BLOCK), min(keys, BLOCK)
    return copies * rows * arch.num_heads * queries * keys * _FLOAT32


def scratch_bytes(
    arch: Architecture, config: ConfigDict, rows: int, width: int, mesh: Mapping[str, int], training: bool
) -> int:
    """Return the estimated scratch of one device, in bytes; gradients of weights and unpacked weights not among it.

    Args:
      arch: of the model.
      config: the whole configuration.
      rows: sequences on the device, of one micro-batch.
      width: tokens of a sequence, the longer side of an encoder-decoder.
      mesh: sizes of its axes.
      training: whether a backward pass follows.
    """
    size = 4 if config.model.dtype == "float32" else 2
    tokens = rows * math.ceil(width / mesh["sequence"])
    tensor = mesh["tensor"]
    hidden, q, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    gated = any(kind.names.gate or kind.names.gate_up for kind in arch.kinds)
    inner = arch.intermediate_size * (2 if gated else 1)
    projected = 2 * hidden + (q + 2 * kv + inner) // tensor  # what a layer's linear modules give, a token
    layers = arch.num_layers + (arch.encoder.num_layers if arch.encoder else 0)
    used = chosen(config.model.attention, width, width)
    scores = score_bytes(arch, rows, math.ceil(width / mesh["sequence"]), width, used, 3 if training else 2) // tensor
    chunk = min(rows * token_chunk(config, rows, mesh["sequence"]) or tokens, tokens)
    # What a chunk of tokens needs at one time, and what attention takes and gives of all.
    work = chunk * size * (projected + arch.intermediate_size // tensor + 2 * hidden)
    work += (tokens - chunk) * size * (2 * (q + kv) // tensor + hidden)
    chunk = min(loss_chunk(config, arch.vocab_size, rows), width) * rows
    logits = chunk * arch.vocab_size * _FLOAT32 * (2 if training else 1)
    if not training:
        return max(work + scores, logits) + tokens * hidden * size * 2
    kept = {"full": hidden, "offload": 0, "dots": hidden + projected}.get(config.model.remat)
    if kept is None:  # everything that the backward pass reads, scores among it
        return layers * (tokens * size * (2 * projected + 4 * hidden) + scores * 2 // 3) + max(work, logits)
    return layers * tokens * kept * size + max(2 * work + scores, logits) + tokens * hidden * size * 2
