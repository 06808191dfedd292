"""How much a training step computes, from the model's shapes, and how long that takes at the least."""

from __future__ import annotations

import dataclasses
import math

from ml_collections import ConfigDict

from tpu_tune.models import Architecture
from tpu_tune.planning.devices import Device

# What well-tuned training reaches of the roofline; the model cards and papers of the large models say 0.35 to 0.6.
ROOFLINE_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class Work:
    """The floating point operations of one step over all devices.

    Attributes:
      model: what the mathematics asks for: causal attention, nothing twice. The numerator of MFU.
      hardware: what is computed: what remat repeats, and scores that the mask then hides.
      formula: of `model`, in words.
    """

    model: float
    hardware: float
    formula: str


def step_work(arch: Architecture, config: ConfigDict, rows: int, width: int, encoder_width: int, adapters: int) -> Work:
    """Count a step's floating point operations; a product of (m, k) and (k, n) has 2 m k n.

    Args:
      arch: of the model.
      config: the whole configuration.
      rows: of a step, over all devices and micro-batches.
      width: tokens a row; with an encoder, of the decoder's side.
      encoder_width: tokens a row of the encoder's side.
      adapters: parameters of LoRA; 0 where every weight is trained.
    """
    encoder = arch.encoder
    cross = tuple(name for kind in arch.kinds for name in (kind.names.cross_k, kind.names.cross_v) if name)
    layers, head = 0.0, 0.0  # products with weights, forward
    for module in arch.modules():
        if module.kind != "linear":
            continue
        read = encoder_width if encoder and module.layers_path == encoder.names.layers else width
        if cross and module.path.endswith(cross):
            read = encoder_width
        count = 2.0 * math.prod(module.shape) * (len(module.layers) or 1) * rows * read
        layers, head = (layers, head + count) if module.is_head else (layers + count, head)
    seen, computed = _scores(arch, rows, width, width)
    if encoder:
        parts = _scores(encoder, rows, encoder_width, encoder_width), _cross(arch, rows, width, encoder_width)
        seen, computed = (total + sum(part[i] for part in parts) for i, total in enumerate((seen, computed)))
    tokens = rows * max(width, encoder_width)
    full = config.method == "full"
    # Backward: as much again for the inputs' gradients, and for the weights' where these are trained.
    model = (3 if full else 2) * (layers + head) + 3 * seen + 6.0 * adapters * tokens
    again = {"full": layers + computed, "offload": layers + computed, "dots": computed}.get(config.model.remat, 0.0)
    hardware = model - 3 * seen + 3 * computed + again
    words = (
        f"{6 if full else 4} x parameters of matrices x tokens"
        + ("" if full else " + 6 x parameters of adapters x tokens")
        + " + 12 x attention width x layers x tokens x keys that each sees"
    )
    return Work(model, hardware, words)


def _scores(arch: Architecture, rows: int, queries: int, keys: int) -> tuple[float, float]:
    """Return forward operations of both products of attention, over what is seen and over all that is computed."""
    wide = 4.0 * arch.num_heads * arch.head_dim * rows * queries
    seen = 0.0
    for kind in arch.layer_kinds:
        window = min(kind.window or keys, keys)
        # Query t sees min(t, window) keys: their mean over a row.
        seen += wide * ((keys + 1) / 2 if window == keys else window * (1 - (window - 1) / (2 * keys)))
    everything = wide * keys * len(arch.layer_kinds)
    return (seen, everything) if arch.causal else (everything, everything)


def _cross(arch: Architecture, rows: int, queries: int, keys: int) -> tuple[float, float]:
    count = 4.0 * arch.num_heads * arch.head_dim * rows * queries * keys * arch.num_layers
    return count, count


def roofline_seconds(
    device: Device, work: Work, weights: int, state: int, micro_batches: int, passes: int
) -> tuple[float, str]:
    """Return (seconds of a step at the least, what bounds them: "computing" or "memory").

    Args:
      device: with the peaks of one of its devices.
      work: of the step, over all devices.
      weights: bytes on a device that each pass reads.
      state: bytes on a device of what the optimizer reads and writes.
      micro_batches: of a step.
      passes: over the weights in a micro-batch: forward, backward, and once more with remat.
    """
    computing = work.hardware / device.count / device.flops
    moving = (weights * passes * micro_batches + 2 * state) / device.bandwidth
    return max((computing, "computing"), (moving, "memory"))
