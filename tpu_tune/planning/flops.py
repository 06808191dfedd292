"""Floating point operations of a training step, from the model's shapes, and the least time that they can take."""

from __future__ import annotations

import dataclasses
import math

from ml_collections import ConfigDict

from tpu_tune.kernels.delta_rule import CHUNK, PRODUCTS
from tpu_tune.models import Architecture
from tpu_tune.models.delta_modules import DeltaNet
from tpu_tune.planning.devices import Device
from tpu_tune.training.execution import remat

# Share of the roofline that well-tuned training reaches; papers and model cards of large models report 0.35 to 0.6.
ROOFLINE_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class Work:
    """The floating point operations of one step over all devices.

    Attributes:
      model: operations that the mathematics needs: causal attention, no recomputation. The numerator of MFU.
      hardware: operations that are executed: with recomputed layers, and with scores that the mask then discards.
      formula: formula of `model`, in words.
    """

    model: float
    hardware: float
    formula: str


def step_work(arch: Architecture, config: ConfigDict, rows: int, width: int, encoder_width: int, adapters: int) -> Work:
    """Count a step's floating point operations; a product of (m, k) and (k, n) has 2 m k n.

    Args:
      arch: the model's architecture.
      config: the whole configuration.
      rows: rows per step, over all devices and micro-batches.
      width: tokens per row; with an encoder, those of the decoder.
      encoder_width: tokens per row of the encoder.
      adapters: number of LoRA's parameters, of experts those that a token goes to; 0 in full fine-tuning.
    """
    encoder = arch.encoder
    cross_names = tuple(name for kind in arch.kinds for name in (kind.names.cross_k, kind.names.cross_v) if name)
    layers, head = 0.0, 0.0  # products with weights, forward
    for module in arch.modules():
        if module.kind != "linear":
            continue
        tokens_per_row = encoder_width if encoder and module.layers_path == encoder.names.layers else width
        if cross_names and module.path.endswith(cross_names):
            tokens_per_row = encoder_width
        each = len(module.layers or (None,)) * (module.experts_per_token or 1)
        count = 2.0 * math.prod(module.shape) * each * rows * tokens_per_row
        layers, head = (layers, head + count) if module.is_head else (layers + count, head)
    attention = [_attention(arch, rows, width, width)]
    if encoder:
        cross = 4.0 * arch.num_heads * arch.head_dim * rows * width * encoder_width * arch.num_layers
        attention += [_attention(encoder, rows, encoder_width, encoder_width), (cross, cross)]
    needed, executed = (sum(operations) for operations in zip(*attention, strict=True))
    tokens = rows * max(width, encoder_width)
    full = config.method == "full"
    # The backward pass computes as much again for the inputs' gradients, and for those of trained weights.
    model = (3 if full else 2) * (layers + head) + 3 * needed + 6.0 * adapters * tokens
    repeated = {"full": layers + executed, "offload": layers + executed, "dots": executed}.get(remat(config), 0.0)
    hardware = model - 3 * needed + 3 * executed + repeated
    formula = (
        f"{6 if full else 4} x parameters of matrices"
        + (f" ({arch.experts.per_token} of {arch.experts.count} experts)" if arch.experts else "")
        + " x tokens"
        + ("" if full else " + 6 x parameters of adapters x tokens")
        + " + 12 x attention width x layers x tokens x keys per token"
        + (" + 18 x DeltaNet states x tokens" if any(kind.delta for kind in arch.kinds) else "")
    )
    return Work(model, hardware, formula)


def _attention(arch: Architecture, rows: int, queries: int, keys: int) -> tuple[float, float]:
    """Return forward operations of both products of self-attention: with unmasked keys alone, and with all keys."""
    unmasked = all_keys = 0.0
    for kind in arch.layer_kinds:
        if kind.delta is not None:
            needed, executed = _delta_rule(kind.delta)
            unmasked, all_keys = unmasked + rows * queries * needed, all_keys + rows * queries * executed
            continue
        per_key = 4.0 * arch.num_heads * arch.heads(kind)[1] * rows * queries
        window = min(kind.window or keys, keys)
        # Query t attends to min(t, window) keys; this is the mean over a row.
        unmasked += per_key * ((keys + 1) / 2 if window == keys else window * (1 - (window - 1) / (2 * keys)))
        all_keys += per_key * keys
    return (unmasked, all_keys) if arch.causal else (all_keys, all_keys)


def _delta_rule(delta: DeltaNet) -> tuple[float, float]:
    """Return forward operations a token of a DeltaNet's convolution and state: as defined, and in chunks."""
    convolution = 2.0 * delta.taps * delta.channels
    state = 2.0 * delta.value_heads * delta.key_dim * delta.value_dim  # one product of the state, of three a token
    scores = 4.0 * CHUNK * (delta.key_heads * delta.key_dim + delta.value_width)  # keys, queries with keys; their uses
    systems = 2.0 * delta.value_heads * PRODUCTS * CHUNK * CHUNK
    return convolution + 3 * state, convolution + 3 * state + scores + systems


def roofline_seconds(
    device: Device, work: Work, weights: int, state: int, micro_batches: int, passes: int
) -> tuple[float, str]:
    """Return the least seconds that a step can take, and what limits it: "computing" or "memory".

    Args:
      device: the device with its peaks.
      work: the step's work over all devices.
      weights: bytes per device that each pass over the weights reads.
      state: bytes per device that the optimizer reads and writes.
      micro_batches: micro-batches per step.
      passes: passes over the weights per micro-batch: forward, backward, and one more if remat recomputes.
    """
    computing = work.hardware / device.count / device.flops
    moving = (weights * passes * micro_batches + 2 * state) / device.bandwidth
    return max((computing, "computing"), (moving, "memory"))
