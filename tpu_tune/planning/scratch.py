"""Scratch memory of a step, estimated from shapes, for devices whose compiler is not installed.

Scratch is the memory that a step needs in addition to everything that is kept between steps. The estimate adds up the
large arrays that exist at the same time: what remat keeps of every layer, the arrays of one layer with their gradients,
attention scores, one chunk of logits. It aims to be within a third of the compilers' figures (one row of 2,048 tokens
in nf4, in November 2026: LLaMA-7B 1.27 GB here, 1.34 by CUDA's compiler for an RTX 3090; 33B 2.91 and 2.72).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from tpu_tune.kernels.attention import chosen
from tpu_tune.kernels.blockwise import BLOCK
from tpu_tune.kernels.delta_rule import CHUNK
from tpu_tune.models import Architecture, LayerKind
from tpu_tune.training.execution import loss_chunk, remat, token_chunk

_FLOAT32 = 4


def score_bytes(arch: Architecture, rows: int, queries: int, keys: int, implementation: str, copies: int) -> int:
    """Return the bytes of attention scores (float32) that exist at the same time in one layer.

    Args:
      arch: the model's architecture.
      rows: sequences per device.
      queries, keys: tokens per sequence.
      implementation: "reference" holds all scores, any other those of one block of queries and one of keys.
      copies: arrays of that size at the same time: scores and weights, and in training their gradient.
    """
    if implementation != "reference":
        queries, keys = min(queries, BLOCK), min(keys, BLOCK)
    return copies * rows * arch.num_heads * queries * keys * _FLOAT32


def _state_bytes(kind: LayerKind) -> int:
    """Return the bytes of one state (float32) of a layer; the backward pass reads one a chunk of tokens."""
    delta = kind.delta
    return delta.value_width * delta.key_dim * _FLOAT32 if delta else 0


def scratch_bytes(
    arch: Architecture, config: ConfigDict, rows: int, width: int, mesh: Mapping[str, int], training: bool
) -> int:
    """Return the estimated scratch of one device, in bytes, without gradients of weights and dequantized weights.

    Args:
      arch: the model's architecture.
      config: the whole configuration.
      rows: sequences per device in one micro-batch.
      width: tokens per sequence, of an encoder-decoder those of the longer side.
      mesh: size of each mesh axis.
      training: whether there is a backward pass.
    """
    size = 4 if config.model.dtype == "float32" else 2
    tokens = rows * math.ceil(width / mesh["sequence"])
    tensor = mesh["tensor"]
    hidden, heads = arch.hidden_size, [arch.heads(kind) for kind in arch.kinds]
    q, kv = arch.num_heads * max(size for _, size in heads), max(count * size for count, size in heads)
    single, inner = _mlp_widths(arch)
    projected = 2 * hidden + (q + 2 * kv + inner) // tensor  # outputs of a layer's linear modules, per token
    layers = arch.num_layers + (arch.encoder.num_layers if arch.encoder else 0)
    used = chosen(config.model.attention, width, width)
    scores = score_bytes(arch, rows, math.ceil(width / mesh["sequence"]), width, used, 3 if training else 2) // tensor
    scores = max(scores, rows * math.ceil(width / CHUNK) * max(map(_state_bytes, arch.kinds)) // tensor)
    chunk = min(rows * token_chunk(config, rows, mesh["sequence"]) or tokens, tokens)
    # Everything for one chunk of tokens, and attention's inputs and outputs for the others.
    work = chunk * size * (projected + single // tensor + 2 * hidden)
    work += (tokens - chunk) * size * (2 * (q + kv) // tensor + hidden)
    chunk = min(loss_chunk(config, arch.vocab_size, rows), width) * rows
    if arch.num_labels:
        chunk = rows * width
    logits = chunk * (arch.num_labels or arch.vocab_size) * _FLOAT32 * (2 if training else 1)
    if not training:
        return max(work + scores, logits) + tokens * hidden * size * 2
    kept = {"full": hidden, "offload": 0, "dots": hidden + projected + q // tensor}.get(remat(config))
    if kept is None:  # everything that the backward pass reads, including scores
        return layers * (tokens * size * (2 * projected + 4 * hidden) + scores * 2 // 3) + max(work, logits)
    return layers * tokens * kept * size + max(2 * work + scores, logits) + tokens * hidden * size * 2


def _mlp_widths(arch: Architecture) -> tuple[int, int]:
    """Return how many numbers a token has between an MLP's products, and how many its first products give.

    Of experts every token has several copies, whose inputs and results are counted too.
    """
    gated = any(kind.names.gate or kind.names.gate_up for kind in arch.kinds)
    if arch.experts is None:
        width = max(kind.intermediate_size or arch.intermediate_size for kind in arch.kinds)
        return width, width * (2 if gated else 1)
    width = arch.experts.per_token * arch.experts.width + arch.experts.shared_width
    return width, 2 * width + 3 * arch.experts.per_token * arch.hidden_size
