"""`calibrate`: the base's matrices rounded against the activations of the run's own rows, layer by layer.

A layer's inputs come from the layers before it as they are stored, so that each layer is fitted to what it will get.
One layer's weights and its inputs' moments (of experts, each one's own) are on the device at a time; the hidden states
of all rows wait in host memory. A layer is written when it is done, and a start that was killed goes on behind the
last one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from tpu_tune.checkpoints import calibrated
from tpu_tune.checkpoints.params import load_params, read_layer
from tpu_tune.checkpoints.run_checkpoints import base_fingerprint
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.data import PackedRows, PairRows
from tpu_tune.data.mixture import MixedRows
from tpu_tune.errors import UserError, counted
from tpu_tune.models import Architecture, Execution
from tpu_tune.models.one_layer import first_of_kind, layer_inputs, run_layer
from tpu_tune.tensors import Module, QuantizedTensor
from tpu_tune.training.execution import compute_dtype
from tpu_tune.transforms import QuantizeConfig, quantize_weight, quantized_paths
from tpu_tune.transforms.gptq import round_against, round_experts
from tpu_tune.transforms.moments import Moments, add_rows

Rows = PackedRows | PairRows | MixedRows
Say = Callable[[str], None]


def calibrate(
    source: WeightSource,
    arch: Architecture,
    config: ConfigDict,
    quantization: QuantizeConfig,
    rows: Rows | None,
    say: Say,
) -> str:
    """Round the base's matrices against activations, as far as the run has not done so; return the folder they are in.

    Args:
      source: the run's model, its weights unquantized.
      arch: its facts.
      config: the run's configuration.
      quantization: what is quantized, and how.
      rows: the training rows, of which `quantize.calibration` are used.
      say: receives lines for the user.

    Raises:
      UserError: an encoder-decoder, no rows, or the folder cannot be written.
    """
    run, mark = RunDirectory(config.output_dir), base_fingerprint(source, config)
    folder = run.file(calibrated.FOLDER)
    has_run = run.exists()  # then the rows are its own: another data.train is refused
    if has_run and all(calibrated.names_in(folder, layer, mark) for layer in range(arch.num_layers)):
        return folder
    if arch.encoder or not isinstance(rows, PackedRows | MixedRows):
        raise UserError("quantize.calibration needs a decoder's rows in data.train; set it to 0 for this model")
    chosen = _chosen(rows, config)
    stamp = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in chosen)).hexdigest()
    job = Calibration(source, arch, quantization, compute_dtype(config), folder, mark, stamp)
    count, tokens = len(chosen[0]), int(np.sum(chosen[2] > 0))
    say(f"calibration: {quantization.format} rounded by {counted(count, 'row')}, {tokens:,} tokens of data.train")
    for line in job.left_plain():
        say(line)
    started = time.monotonic()
    job.run(chosen, say)
    say(f"calibration: done in {time.monotonic() - started:.0f} s; the rounded layers are in {folder}")
    return folder


def _chosen(rows: PackedRows | MixedRows, config: ConfigDict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (rows, T) ids, positions and segments of rows drawn by `data.data_seed`."""
    count = min(config.quantize.calibration, len(rows))
    drawn = np.sort(np.random.RandomState(config.data.data_seed).permutation(len(rows))[:count])
    batch = rows.take(drawn)
    return batch["input_ids"], batch["positions"], batch["segment_ids"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What is to be rounded, and where it is to be written.

    Attributes:
      source: the model, its weights unquantized.
      arch: its facts; a decoder.
      quantization: what is quantized, and how.
      dtype: of the activations.
      folder, mark, stamp: see `calibrated.write_layer` (folder, mark, rows).
    """

    source: WeightSource
    arch: Architecture
    quantization: QuantizeConfig
    dtype: Any
    folder: str
    mark: str
    stamp: str

    @property
    def execution(self) -> Execution:
        """How layers run here."""
        return Execution(jnp.dtype(self.dtype))

    def modules(self) -> tuple[list[Module], list[Module]]:
        """Return the modules whose matrices are rounded against activations, and the others that are quantized."""
        paths = quantized_paths(self.arch.modules(), self.quantization)
        named = [module for module in self.arch.modules() if module.weight in paths]
        fitted = [one for one in named if one.layers and one.kind == "linear"]
        return fitted, [module for module in named if module not in fitted]

    def left_plain(self) -> list[str]:
        """Return a line on what is rounded without activations."""
        names = ", ".join(module.path for module in self.modules()[1])
        return [f"calibration: rounded plainly, as without it: {names}"] if names else []

    def run(self, chosen: tuple[np.ndarray, ...], say: Say) -> None:
        """Go through the layers, writing each.

        Args:
          chosen: (rows, T) int32 each: token ids, positions in their documents, and segments.
          say: receives a line a layer.
        """
        arch, dtype = self.arch, self.execution.dtype
        ids, positions, segments = chosen
        outside = self._outside()
        rows = [slice(row, row + 1) for row in range(len(ids))]
        states = [_on_host(layer_inputs(arch, self.execution, outside, ids[row], positions[row])) for row in rows]
        del outside
        users = {kind.keys_from for kind in arch.layer_kinds if kind.keys_from is not None}
        kept: list[dict[int, Any]] = [{} for _ in states]

        for layer in range(arch.num_layers):
            kind = arch.layer_kinds[layer]

            def tokens(row: int, layer: int = layer, kind: Any = kind) -> tuple[Any, ...]:
                inputs = states[row][1]
                others = {} if kind.keys_from is None else {kind.keys_from: kept[row][kind.keys_from]}
                return positions[rows[row]], segments[rows[row]], others, None if inputs is None else inputs[layer]

            leaves, found = self._leaves(layer), calibrated.read_layer(self.folder, layer, self.mark, self.stamp)
            if found is None:
                found, unseen = self._rounded(layer, leaves, [state[0] for state in states], tokens)
                calibrated.write_layer(self.folder, layer, found, self.mark, self.stamp)
                say(f"calibration: layer {layer + 1} of {arch.num_layers}{_said_of(unseen)}")
            leaves = self._stored(layer, leaves, found)
            for row, (x, inputs) in enumerate(states):
                new, own, _ = run_layer(arch, self.execution, first_of_kind(arch, layer), leaves, x, tokens(row))
                states[row] = (np.asarray(new, dtype), inputs)
                if layer in users:
                    kept[row][layer] = _on_host(own)

    def _rounded(
        self, layer: int, leaves: Mapping[str, Any], states: list[np.ndarray], tokens: Callable[[int], Any]
    ) -> tuple[dict[str, QuantizedTensor], int]:
        """Return Hugging Face name -> matrix of one layer, rounded against its inputs over all rows.

        And how many experts had no input.
        """
        own = {self._relative(module): module for module in self.modules()[0] if layer in module.layers}
        wanted = tuple(path for path in own if not isinstance(leaves[path], QuantizedTensor))
        moments: dict[tuple[str, ...], Moments] = {}
        for row, x in enumerate(states):
            stands_for = first_of_kind(self.arch, layer)
            inputs = run_layer(self.arch, self.execution, stands_for, leaves, x, tokens(row), wanted)[2]
            for paths, seen in inputs.items():
                moments[paths] = add_rows(moments.get(paths), *seen)
        matrices: dict[str, QuantizedTensor] = {}
        unseen = 0
        for paths in list(moments):
            of_paths = moments.pop(paths)
            unseen = max(unseen, int(jnp.sum(of_paths.rows == 0)))
            for path in paths:
                matrix = self._matrix(layer, path, leaves[path], of_paths)
                matrices |= _in_file(own[path], layer, jax.tree.map(np.asarray, matrix))
        return matrices, unseen

    def _matrix(self, layer: int, path: str, weight: Array, moments: Moments) -> QuantizedTensor:
        """Return a leaf of one layer, rounded."""
        if not moments.rows.ndim:
            return round_against(weight, moments.sums, self.quantization)
        inner = path == f"{self.arch.layer_kinds[layer].names.expert_down}.weight"
        return round_experts(weight, moments, not inner, self.quantization)

    def _leaves(self, layer: int) -> dict[str, Any]:
        """Return a layer's leaves, unquantized, on the device, by their paths relative to the layer."""
        leaves = read_layer(self.source, self.arch, layer)
        return {self._cut(path): jax.tree.map(jnp.asarray, leaf) for path, leaf in leaves.items()}

    def _stored(self, layer: int, leaves: Mapping[str, Any], found: Mapping[str, QuantizedTensor]) -> dict[str, Any]:
        """Return a layer's leaves as the run will have them."""
        new = dict(leaves)
        for module in [module for part in self.modules() for module in part if layer in module.layers]:
            path, names = self._relative(module), _names(module, layer)
            if names[0] not in found:
                new[path] = quantize_weight(new[path], self.quantization)
                continue
            matrices = [found[name] for name in names]
            matrix = jax.tree.map(lambda *each: np.stack(each), *matrices) if module.experts_path else matrices[0]
            new[path] = jax.tree.map(lambda part, m=module: jnp.asarray(m.interleave(part)), matrix)
        return new

    def _outside(self) -> dict[str, Any]:
        """Return the leaves outside of the layers, unquantized."""
        return load_params(self.source, self.arch, self.execution.dtype, only=lambda module: not module.layers)

    def _relative(self, module: Module) -> str:
        return self._cut(module.weight)

    def _cut(self, path: str) -> str:
        return path[len(self.arch.names.layers) :].partition(".")[2]


def _names(module: Module, layer: int) -> list[str]:
    """Return the Hugging Face names of the tensors that a layer's leaf is made of: one, or one for each expert."""
    return [module.tensor_name(name, "weight") for name in module.names_of(layer)]


def _in_file(module: Module, layer: int, matrix: QuantizedTensor) -> dict[str, QuantizedTensor]:
    """Return Hugging Face name -> what stands for it of one layer's leaf, columns in the file's order."""
    matrix, names = jax.tree.map(module.deinterleave, matrix), _names(module, layer)
    if not module.experts_path:
        return {names[0]: matrix}
    return {name: jax.tree.map(lambda part, at=at: part[at], matrix) for at, name in enumerate(names)}


def _said_of(unseen: int) -> str:
    return f"; {counted(unseen, 'expert gets', 'experts get')} no token, and plain rounding" if unseen else ""


def _on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)
