"""From a configuration to everything a run needs on its devices: model, adapters, optimizer, jitted steps.

Nothing here loops. `check_settings` and `open_model` find a user's mistakes while they cost nothing, `prepare_model`
reads the weights to where they will live, `prepare_steps` compiles lazily what the loop calls.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import peft
from tpu_tune.checkpoints.params import check_names, load_params, open_architecture
from tpu_tune.checkpoints.source import WeightSource
from tpu_tune.checkpoints.vocabulary import check_tokens, open_configured
from tpu_tune.data.sources import resolve
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture, architecture, check_length
from tpu_tune.training import offload
from tpu_tune.training.execution import compute_dtype, execution, loss_chunk
from tpu_tune.training.loggers import reporters
from tpu_tune.training.optimizers import canonical_name, loraplus_factor, make_optimizer
from tpu_tune.training.schedules import make_schedule
from tpu_tune.training.step import Problem, TrainState, init_state, make_eval_step, make_train_step
from tpu_tune.transforms import (
    LoraConfig,
    QuantizeConfig,
    Targets,
    find_targets,
    lora,
    quantize_weight,
    quantized_paths,
    sharding,
    split,
    token_rows,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedModel:
    """A model on its mesh, split into what is trained and what is not.

    Attributes:
      source: where the weights came from; None for `abstract_model`'s.
      architecture: of the model.
      mesh: the devices.
      targets: of LoRA; None under method=full.
      trainable: flat tree of float32 leaves, sharded.
      frozen: flat tree, sharded.
      shardings: of every leaf of the base tree.
    """

    source: WeightSource | None
    architecture: Architecture
    mesh: Mesh
    targets: Targets | None
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    shardings: dict[str, Any]

    @property
    def num_trainable(self) -> int:
        """Trained parameters; the zero padding of uneven ranks is not counted."""
        total = sum(leaf.size for leaf in self.trainable.values())
        padding = sum(
            (target.rank - rank) * sum(target.module.shape)
            for target in (self.targets.adapted if self.targets else ())
            for rank in target.ranks
        )
        return total - padding


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What evaluating needs; see `Steps`."""

    evaluate: Callable[..., dict[str, jax.Array]]
    put_batch: Callable[[Mapping[str, np.ndarray], int], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Steps:
    """The jitted functions of a run.

    Attributes:
      train: (state, frozen, batch) -> (state, metrics); the state is donated.
      evaluate: (trainable, frozen, batch) -> sums.
      initial_state: a fresh state, sharded; of shapes only where the model is.
      start: trainable leaves -> a fresh state, sharded, in buffers of its own.
      put_batch: NumPy batch -> arrays on the mesh; takes the number of leading axes before (rows, tokens).
    """

    train: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., dict[str, jax.Array]]
    initial_state: TrainState
    start: Callable[[Mapping[str, Any]], TrainState]
    put_batch: Callable[[Mapping[str, np.ndarray], int], dict[str, jax.Array]]


def check_settings(config: Mapping[str, Any] | ConfigDict, with_data: bool = True) -> ConfigDict:
    """Hold a configuration against all that is known before anything is loaded or written, and return it whole.

    Args:
      config: the configuration, possibly partial.
      with_data: whether the data must be there; a plan needs none.

    Raises:
      UserError: an unknown optimizer, schedule (or setting of it) or reporter, data that is not there, or settings
        that exclude each other.
    """
    config = configuration.from_dict(config)
    canonical_name(config.train.optim)
    make_schedule(
        config.train.lr_scheduler_type,
        config.train.learning_rate,
        max(config.train.max_steps, 1),
        config.train.warmup_steps,
        config.train.warmup_ratio,
        **config.train.lr_scheduler_kwargs,
    )
    reporters(config.train.report_to)
    storage_dtype(config)
    if config.model.adapter and config.method != "lora":
        raise UserError(
            "model.adapter needs method=lora; to train a merged model in full, merge it with tpu-tune export first"
        )
    if with_data:
        resolve(config.data.train)
    if with_data and config.data.eval:
        resolve(config.data.eval)
    return config


def open_model(config: ConfigDict) -> tuple[WeightSource, Architecture]:
    """Open the model, and hold what the configuration says about its modules against it; no weight is read.

    Raises:
      UserError: no usable model, an adapter that does not fit, names that match no module, or rows longer than the
        model has positions for.
    """
    source = open_configured(config.model)
    arch = open_architecture(source)
    check_names(source, arch)
    check_length(arch, config.data.max_length)
    quantized_paths(arch.modules(), QuantizeConfig(**config.quantize))
    if config.model.adapter:
        check_tokens(source, config.model.adapter)
    if config.method == "lora":
        find_targets(arch.modules(), _lora(config, arch, source.added_tokens.values())[0], arch.default_targets)
    return source, arch


def storage_dtype(config: ConfigDict) -> Any:
    """Return the dtype of base weights that stay arrays."""
    if config.method == "full":
        if config.model.param_dtype not in ("auto", "float32"):
            raise UserError(
                f"model.param_dtype={config.model.param_dtype} under method=full would lose small updates "
                "(bfloat16(0.02) - 1e-5 == 0.02); leave it at auto"
            )
        return jnp.dtype("float32")
    return compute_dtype(config) if config.model.param_dtype == "auto" else jnp.dtype(config.model.param_dtype)


def prepare_model(config: ConfigDict, mesh: Mesh, progress: Callable[[int, int], None] | None = None) -> PreparedModel:
    """Open, check and load the model, quantize it on the way, and split it by the method.

    Raises:
      UserError: anything about the model, the adapter or the LoRA settings that does not fit.
    """
    source = open_configured(config.model)
    arch = open_architecture(source)
    targets, adapters, quantization = _methods(config, arch, source.added_tokens.values())
    stacked = arch.stacked()
    found: dict[str, Any] = {}

    def place(path: str, leaf: Any) -> Any:
        found[path] = sharding.leaf_sharding(path, leaf, mesh, path in stacked, units=sharding_units(arch))
        return jax.tree.map(put, leaf, found[path])

    params = load_params(source, arch, storage_dtype(config), quantization, place, progress)
    if targets is not None and adapters is None:
        adapters = lora.init(targets, params, jax.random.key(config.seed))
    trainable, frozen = split(params, targets, adapters)
    del params
    placed = sharding.shardings(trainable, mesh, stacked_trainable(targets, stacked), units=sharding_units(arch))
    trainable = {path: put(leaf, placed[path]) for path, leaf in trainable.items()}
    return PreparedModel(source, arch, mesh, targets, trainable, frozen, found)


def abstract_model(config: ConfigDict, model_config: Mapping[str, Any], mesh: Mesh) -> PreparedModel:
    """Return what `prepare_model` would, of shapes, dtypes and shardings only: to compile for devices that are not there.

    Args:
      config: the whole configuration; `model.path` is not read.
      model_config: as a Hugging Face config.json, of the model with `model.add_special_tokens` in it.
      mesh: of devices, or of a topology's.
    """
    arch = architecture(model_config)
    added = range(arch.vocab_size - len(config.model.add_special_tokens), arch.vocab_size)  # which ones says no shape
    targets, adapters, quantization = _methods(config, arch, added)
    dtype, stacked, quantized = storage_dtype(config), arch.stacked(), quantized_paths(arch.modules(), quantization)
    base = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in arch.leaf_shapes().items()}
    quantize = functools.partial(quantize_weight, config=quantization)
    base = {path: jax.eval_shape(quantize, leaf) if path in quantized else leaf for path, leaf in base.items()}

    def parts(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        fresh = adapters
        if targets is not None and fresh is None:
            fresh = lora.init(targets, params, jax.random.key(config.seed))
        return split(params, targets, fresh)

    trainable, frozen = jax.eval_shape(parts, base)
    found = sharding.shardings(base, mesh, stacked, units=sharding_units(arch))
    placed = sharding.shardings(trainable, mesh, stacked_trainable(targets, stacked), units=sharding_units(arch))
    trainable = {path: _at(leaf, placed[path]) for path, leaf in trainable.items()}
    frozen = {path: jax.tree.map(_at, leaf, found[path]) for path, leaf in frozen.items()}
    return PreparedModel(None, arch, mesh, targets, trainable, frozen, found)


def _at(leaf: Any, home: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)


def _lora(
    config: ConfigDict, arch: Architecture, added_tokens: Iterable[int]
) -> tuple[LoraConfig, dict[str, Any] | None]:
    """Return the LoRA settings, with the added tokens among the trained ones if they shall be, and the adapter."""
    spec, adapters = LoraConfig(**config.lora), None
    if config.model.adapter:
        spec, adapters = peft.read_adapter(config.model.adapter, arch)
        spec = dataclasses.replace(spec, dropout=config.lora.dropout)
    if not config.model.train_added_tokens:
        return spec, adapters
    able = [module for module in arch.modules() if module.path == arch.names.embed or module.is_head]
    trained = {rows.module.path: list(rows.ids) for rows in token_rows(able, spec.trainable_token_indices)}
    before = {path: list(ids) for path, ids in trained.items()}
    for module in able:
        if module.tied_to or any(module.path.endswith(name) for name in spec.modules_to_save):
            continue  # its rows are trained already, or with the embedding's
        ids = trained.setdefault(module.path, [])
        ids += [number for number in added_tokens if number not in ids]
    if adapters and before and trained != before:
        raise UserError(
            f"model.train_added_tokens: {config.model.adapter} trains other tokens than model.add_special_tokens; "
            "leave it false to go on with the adapter's"
        )
    return dataclasses.replace(spec, trainable_token_indices=trained), adapters


def _methods(
    config: ConfigDict, arch: Architecture, added_tokens: Iterable[int]
) -> tuple[Targets | None, dict[str, Any] | None, QuantizeConfig]:
    """Return what is trained, the adapter to start from, and what is quantized."""
    modules = arch.modules()
    spec, adapters = _lora(config, arch, added_tokens)
    if config.model.adapter:
        log.info(
            "starting from %s: its rank, alpha and targets replace lora.*; only lora.dropout is taken from the config",
            config.model.adapter,
        )
    targets = find_targets(modules, spec, arch.default_targets) if config.method == "lora" else None
    quantization = QuantizeConfig(**config.quantize)
    if targets is not None and not isinstance(quantization.exclude, str):  # what is trained in full cannot be quantized
        saved = [module.path.rsplit(".")[-1] for module in targets.saved]
        quantization = dataclasses.replace(quantization, exclude=[*quantization.exclude, *saved])
    return targets, adapters, quantization


def prepare_steps(config: ConfigDict, model: PreparedModel, total_steps: int | None) -> Steps:
    """Build optimizer, schedule and the jitted steps; compiling waits for the first call.

    Args:
      config: the whole configuration.
      model: from `prepare_model`.
      total_steps: the schedule's length. None: no schedule; the learning rate is a value in the optimizer's state
        (`optimizers.set_learning_rate`).
    """
    stacked = stacked_trainable(model.targets, model.architecture.stacked())
    schedule = (
        None
        if total_steps is None
        else make_schedule(
            config.train.lr_scheduler_type,
            config.train.learning_rate,
            total_steps,
            config.train.warmup_steps,
            config.train.warmup_ratio,
            **config.train.lr_scheduler_kwargs,
        )
    )
    optimizer = make_optimizer(
        config.train, schedule, stacked=stacked.__contains__, factor=_rate_factor(config, model, stacked)
    )
    problem = _problem(config, model, config.train.per_device_train_batch_size)
    dropout = model.targets is not None and model.targets.spec.dropout > 0
    random = dropout or config.train.neftune_noise_alpha > 0
    key = jax.random.fold_in(jax.random.key(config.seed), 1) if random else None
    start = functools.partial(init_state, optimizer=optimizer, float16=config.model.dtype == "float16")
    shapes = jax.eval_shape(start, model.trainable)
    homes = state_shardings(shapes, model)
    in_parts = None
    if config.train.optim_offload:
        waiting = offload.waits(shapes.opt_state, stacked.__contains__)
        homes = dataclasses.replace(homes, opt_state=offload.to_host(homes.opt_state, waiting))
        in_parts = functools.partial(offload.update_each, homes=homes.opt_state, stacked=stacked.__contains__)
    step = make_train_step(problem, optimizer, schedule, config.train.max_grad_norm, key, in_parts)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in model.trainable.values())
    start = jax.jit(start, out_shardings=homes)
    state = jax.tree.map(_at, shapes, homes) if abstract else start(model.trainable)
    evaluation = prepare_evaluation(config, model)
    return Steps(
        train=jax.jit(step, donate_argnums=0, out_shardings=(homes, None)),
        evaluate=evaluation.evaluate,
        initial_state=state,
        start=start,
        put_batch=evaluation.put_batch,
    )


def prepare_evaluation(config: ConfigDict, model: PreparedModel) -> Evaluation:
    """Build the jitted evaluation alone, without the optimizer and its state."""
    problem = _problem(config, model, config.train.per_device_eval_batch_size)
    return Evaluation(jax.jit(make_eval_step(problem)), functools.partial(_put_batch, model.mesh))


def _problem(config: ConfigDict, model: PreparedModel, rows: int) -> Problem:
    run = execution(config, model.architecture, model.mesh, model.shardings, rows)
    chunk = loss_chunk(config, model.architecture.vocab_size, rows)
    return Problem(model.architecture, run, model.targets, chunk, config.train.neftune_noise_alpha)


def _rate_factor(config: ConfigDict, model: PreparedModel, stacked: frozenset[str]) -> Callable[[str], float] | None:
    if model.targets is None:
        return None
    embeddings = frozenset(
        f"{target.module.path}.{part}"
        for target in model.targets.adapted
        if target.module.kind == "embedding"
        for part in ("lora_A", "lora_B")
    )
    vectors = frozenset(path for path, leaf in model.trainable.items() if leaf.ndim - (path in stacked) == 1)
    return loraplus_factor(config.train, embeddings, vectors)


def state_shardings(shapes: TrainState, model: PreparedModel) -> TrainState:
    """Return the sharding of every leaf of a state: an optimizer's moment lives where its parameter lives."""
    homes = {path: leaf.sharding for path, leaf in model.trainable.items()}
    whole = NamedSharding(model.mesh, PartitionSpec())

    def home(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for entry in reversed(path):
            name = getattr(entry, "key", None)
            if name in homes and leaf.shape == model.trainable[name].shape:
                return homes[name]
        return whole

    return jax.tree_util.tree_map_with_path(home, shapes)


def stacked_trainable(targets: Targets | None, stacked: frozenset[str]) -> frozenset[str]:
    """Return the paths of trainable leaves whose axis 0 is the layers."""
    if targets is None:
        return stacked
    adapters = ("lora_A", "lora_B", "lora_magnitude_vector")
    return stacked | {
        f"{target.module.path}.{name}" for target in targets.adapted if target.layers for name in adapters
    }


def sharding_units(arch: Architecture) -> dict[str, int]:
    """Return path -> smallest piece of `out` that may be cut: a fused projection is cut between its units only."""
    fused = [module for module in arch.modules() if module.unit > 1]
    return {f"{module.path}.{part}": module.unit for module in fused for part in ("weight", "bias", "lora_B")}


def put(array: Any, home: NamedSharding) -> jax.Array:
    """Put an array that every process holds whole onto the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(array, home)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, home, lambda index: host[index])


def micro_batch_rows(config: ConfigDict, mesh: Mesh) -> tuple[int, int]:
    """Return the rows of a micro-batch over all devices: of training, and of evaluation.

    Raises:
      UserError: a row's tokens do not divide over the mesh.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.max_length % mesh.shape["sequence"]:
        raise UserError(
            f"data.max_length={config.data.max_length} does not divide over mesh.sequence={mesh.shape['sequence']}; make it a multiple"
        )
    return config.train.per_device_train_batch_size * shards, config.train.per_device_eval_batch_size * shards


def _put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], leading: int) -> dict[str, jax.Array]:
    home = NamedSharding(mesh, sharding.batch_spec(leading))
    return {name: put(array, home) for name, array in batch.items()}
