"""The written result, loaded again from its files and held against the run's parameters in memory.

The base is shared: of an adapter only the adapter is read, of a fully tuned model one tensor after the other. Where
every tensor that was read equals the run's bit for bit, under the same settings, the model is the same function of the
same numbers and so are its logits; nothing is computed. Elsewhere both run on one short row: a model rounded to its
files' dtype may differ within a bound, an adapter, which is written in float32, not at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tpu_tune.checkpoints.huggingface_write import DTYPES, stored_dtype
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.source import open_source
from tpu_tune.errors import UserError, counted
from tpu_tune.inference.difference import logit_bound, logits_differ
from tpu_tune.inference.run_result import read_own_adapter
from tpu_tune.training import distributed
from tpu_tune.training.execution import compute_dtype, execution
from tpu_tune.training.prepare_model import PreparedModel, put
from tpu_tune.training.step import ModelLoss, TrainState
from tpu_tune.transforms import FullTuning, Targets, find_targets, sharding

_TOKENS = 32  # of the row, for each part that the mesh cuts rows into


@dataclasses.dataclass(frozen=True)
class ReadBack:
    """What reading a result back has shown.

    Attributes:
      difference: the largest absolute difference of a logit from the run's, over the largest; None where not compared.
      bound: the largest that rounding explains.
      words: one line for the log and the report.
      is_other: a tensor is not what was to be written, whatever it does to the logits: a norm may undo a scale.
    """

    difference: float | None
    bound: float
    words: str
    is_other: bool = False

    @property
    def failed(self) -> bool:
        """Whether the files do not hold what was trained."""
        # A NaN is no agreement.
        return self.is_other or (self.difference is not None and not self.difference <= self.bound)

    def summary(self) -> dict[str, Any]:
        """Return what `summary.json` says of it."""
        return {"result_read_back": {**dataclasses.asdict(self), "failed": self.failed}}


def read_back(config: ConfigDict, model: PreparedModel, state: TrainState, directory: str) -> ReadBack:
    """Load what `write_result` has written and compare it with the run; every process has to call this.

    A fully trained model's leaves in `state` may be given up on the way, one for each that is read: there is memory for
    one copy.

    Raises:
      UserError: the files cannot be read.
    """
    if isinstance(model.method, Targets):
        return _of_adapter(config, model, state.trainable, directory)
    if not isinstance(model.method, FullTuning):  # of another package, whose result is a merged model
        return ReadBack(None, 0.0, f"not compared with the run: what method={config.method} trains is merged in it")
    if jax.process_count() > 1:
        return ReadBack(None, 0.0, "not compared with the run: the weights are spread over several processes")
    return _of_model(config, model, dict(state.trainable), directory)


def _of_adapter(config: ConfigDict, model: PreparedModel, trainable: Mapping[str, Array], directory: str) -> ReadBack:
    arch = model.architecture

    def load() -> tuple[Targets, dict[str, Any]]:
        spec, leaves = read_own_adapter(RunDirectory(config.output_dir), config, directory, arch)
        return find_targets(arch.modules(), spec, arch.default_targets), leaves

    targets, leaves = distributed.together("result read back", load)
    own = {path: distributed.full_array(leaf) for path, leaf in trainable.items()}
    bound = logit_bound(compute_dtype(config))
    if _meaning(targets) == _meaning(model.method) and _equal(leaves, own):
        return _same(bound)
    homes = sharding.shardings(leaves, targets.leaves(arch.leaves()), model.mesh)
    placed = {path: put(leaf, homes[path]) for path, leaf in leaves.items()}
    there = _logits(config, dataclasses.replace(model, method=targets))(placed, model.frozen)
    found = _measured(_logits(config, model)(trainable, model.frozen), there, bound)
    return dataclasses.replace(found, words=f"its tensors or settings are not the run's; {found.words}", is_other=True)


def _meaning(targets: Targets) -> tuple[Any, ...]:
    """Return what a method makes of its leaves."""
    adapted = {one.module.path: (one.layers, one.ranks, one.scales) for one in targets.adapted}
    tokens = {rows.module.path: rows.ids for rows in targets.tokens}
    saved = {module.path for module in targets.saved}
    return adapted, saved, set(targets.biases), tokens, targets.spec.use_dora


def _of_model(config: ConfigDict, model: PreparedModel, trainable: dict[str, Array], directory: str) -> ReadBack:
    source = open_source(directory)
    arch, stored = open_architecture(source), stored_dtype(source.config)
    bound = logit_bound(compute_dtype(config), DTYPES[stored])
    rounded, wrong = False, []

    def compare(path: str, leaf: Any) -> None:
        nonlocal rounded
        own = np.asarray(trainable[path]) if path in trainable else np.zeros(0)
        if not np.array_equal(leaf, own):
            rounded = True
            wrong.extend([path] * (not np.array_equal(leaf, own.astype(DTYPES[stored]).astype(np.float32))))

    read = load_params(source, arch, jnp.float32, place=compare)
    wrong += sorted(trainable.keys() - read.keys())
    if not rounded and not wrong:
        return _same(bound)
    logits = _logits(config, dataclasses.replace(model, architecture=arch))
    here = logits(trainable, {})

    def replace(path: str, leaf: Any) -> Array:
        if path in trainable:
            trainable.pop(path).delete()
        return put(leaf, model.shardings[path])

    there = logits(load_params(source, arch, jnp.float32, place=replace), {})
    found = _measured(here, there, bound, f", its files being in {stored}" if stored != "float32" else "")
    if wrong:
        words = (
            f"{counted(len(wrong), 'tensor is', 'tensors are')} not the run's, rounded to {stored} ('{wrong[0]}'), and "
        )
        return dataclasses.replace(found, words=words + found.words, is_other=True)
    return found


def _equal(leaves: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether two trees have the same leaves, bit for bit."""
    return leaves.keys() == own.keys() and all(
        np.array_equal(np.asarray(leaf), np.asarray(own[path])) for path, leaf in leaves.items()
    )


def _same(bound: float) -> ReadBack:
    return ReadBack(0.0, bound, "equal to the run's bit for bit, and so are its logits")


def _measured(here: np.ndarray, there: np.ndarray, bound: float, why: str = "") -> ReadBack:
    most, share = logits_differ(here, there)
    words = f"its logits differ from the run's by at most {most:.3g} ({share:.2%} of the largest){why}"
    return ReadBack(share, bound, f"{words}; rounding explains {bound:.2%}")


def check(failed: bool, words: str, directory: str) -> None:
    """Refuse a result that is not what was trained; its files stay.

    Raises:
      UserError: with the numbers.
    """
    if failed:
        raise UserError(
            f"{directory} does not hold what was trained: read back, {words}. The checkpoints have it: remove that "
            "directory and start the same command again, which writes it anew"
        )


def check_before(run: RunDirectory, directory: str) -> None:
    """Refuse a finished run's result as `check` did when it was written.

    Raises:
      UserError: as there.
    """
    found = run.summary().get("result_read_back") or {}
    check(bool(found.get("failed")), str(found.get("words")), directory)


@dataclasses.dataclass(frozen=True)
class _Logits:
    """No loss: the first row's logits."""

    unit: ClassVar[str] = "tokens"
    is_likelihood: ClassVar[bool] = False

    def weight(self, batch: Mapping[str, Array]) -> Array:
        return jnp.sum(batch["segment_ids"] > 0)

    def __call__(
        self, head: Any, hidden: Float[Array, "B T D"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, "1 T V"], dict[str, Any]]:
        return head(hidden)[:1].astype(jnp.float32), {}


def _logits(config: ConfigDict, model: PreparedModel) -> Callable[..., np.ndarray]:
    """Return the function (trainable, frozen) -> logits (1, tokens, vocabulary) of one short fixed row.

    It runs as the run does: its dtype, kernels and mesh, each device with a row.
    """
    arch, mesh = model.architecture, model.mesh
    length = _TOKENS * mesh.shape["sequence"]
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    run = dataclasses.replace(execution(config, arch, mesh, model.shardings, 1), remat="none", chunk=0)
    ids = np.random.default_rng(0).integers(0, arch.vocab_size, (1, length), np.int32).repeat(rows, 0)
    places, ones = np.arange(length, dtype=np.int32)[None].repeat(rows, 0), np.ones((rows, length), np.int32)
    batch = {"input_ids": ids, "positions": places, "segment_ids": ones}
    if arch.encoder:
        batch |= {"encoder_ids": ids, "encoder_segment_ids": ones}
    on_mesh = NamedSharding(mesh, sharding.batch_spec(0))
    placed = {name: put(array, on_mesh) for name, array in batch.items()}
    loss = ModelLoss(arch, run, model.method, _Logits())

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def first_row(trainable: Any, frozen: Any, batch: Any) -> Array:
        return loss(trainable, frozen, batch, None)[0]

    return lambda trainable, frozen: np.asarray(first_row(trainable, frozen, placed))
