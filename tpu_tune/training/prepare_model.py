"""From a configuration to the model on its devices: opened, loaded, quantized, adapted, split and sharded.

`load_params` reads one tensor after the other straight to where it will live. `abstract_model` gives the same tree as
shapes only, for a plan of devices that are not there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from tpu_tune.checkpoints import starting
from tpu_tune.checkpoints.calibrated import with_calibrated
from tpu_tune.checkpoints.chat_template import read_text
from tpu_tune.checkpoints.methods import METHODS
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.prequantized import stored_formats
from tpu_tune.checkpoints.run_checkpoints import base_fingerprint
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.source import WeightSource
from tpu_tune.checkpoints.vocabulary import open_configured
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture, architecture
from tpu_tune.tensors import LeafSpec
from tpu_tune.training import distributed
from tpu_tune.training.calibration import Rows, calibrate
from tpu_tune.training.execution import check_mesh, compute_dtype
from tpu_tune.transforms import Method, QuantizeConfig, Targets, quantize_weight, quantized_paths, sharding
from tpu_tune.transforms.starts import RESIDUAL, STARTS


@dataclasses.dataclass(frozen=True)
class PreparedModel:
    """A model on its mesh, split into what is trained and what is not.

    Attributes:
      source: where the weights came from; None for `abstract_model`'s.
      architecture: the model's facts.
      mesh: the devices.
      method: which part is trained, and what the model is made of while it is.
      trainable: the trained leaves by path, float32, sharded.
      frozen: the other leaves by path, sharded.
      shardings: the sharding of every leaf of the base tree, by path.
    """

    source: WeightSource | None
    architecture: Architecture
    mesh: Mesh
    method: Method
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    shardings: dict[str, Any]

    @property
    def num_trainable(self) -> int:
        """Trained parameters; the zero padding of uneven ranks is not counted."""
        return self.method.num_parameters(self.trainable)

    @property
    def num_parameters(self) -> int:
        """All parameters: the base's and the adapters', whatever they are stored as."""
        return self.architecture.num_parameters + (self.num_trainable if self.frozen else 0)

    @property
    def specs(self) -> dict[str, LeafSpec]:
        """Path -> facts of every trained leaf."""
        return self.method.leaves(self.architecture.leaves())

    def fingerprint(self, config: ConfigDict) -> str:
        """Return a hash of the base weights and of how they are stored, which a checkpoint's adapters belong to."""
        return base_fingerprint(self.source, config)


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


def prepare_model(
    config: ConfigDict,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
    rows: Rows | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PreparedModel:
    """Open, check and load the model, quantize it on the way, and split it by the method.

    Args:
      config: the whole configuration.
      mesh: the devices.
      progress: called with (tensors read, tensors in all).
      rows: the training rows, for `quantize.calibration`.
      say: receives lines for the user.

    Raises:
      UserError: anything about the model, the adapter or the LoRA settings that does not fit.
    """
    source = open_configured(config, read_text(config.data.chat_template))
    arch = open_architecture(source)
    check_mesh(arch, mesh)
    method, adapters, quantization = _method(config, arch, source.added_tokens.values())
    specs = arch.leaves()
    shardings: dict[str, Any] = {}

    def shard(path: str, leaf: Any) -> Any:
        shardings[path] = sharding.leaf_sharding(path, leaf, specs[path], mesh)
        return jax.tree.map(put, leaf, shardings[path])

    stored = source
    if quantization.calibration:
        folder = calibrate(source, arch, config, quantization, rows, say)
        stored = with_calibrated(source, arch, folder, base_fingerprint(source, config))
    if isinstance(method, Targets) and config.lora.init_lora_weights in STARTS:
        stored, adapters = _started(config, method, adapters, (source, stored), arch, quantization)
    if words := source.quantized():
        say(words)
    params = load_params(stored, arch, storage_dtype(config), quantization, shard, progress)
    trainable, frozen = _split(method, params, adapters, config.seed)
    del params
    trained = sharding.shardings(trainable, method.leaves(specs), mesh)
    trainable = {path: put(leaf, trained[path]) for path, leaf in trainable.items()}
    return PreparedModel(source, arch, mesh, method, trainable, frozen, shardings)


def _started(
    config: ConfigDict,
    method: Targets,
    adapters: dict[str, Any] | None,
    sources: tuple[WeightSource, WeightSource],
    arch: Architecture,
    quantization: QuantizeConfig,
) -> tuple[WeightSource, dict[str, Any] | None]:
    """Return the weights that adapters are trained over and the adapters, where these start from the weights.

    Args:
      config, method, arch, quantization: as in `prepare_model`.
      adapters: those of `model.adapter`: an evaluation's are the run's own, others start from nothing here.
      sources: the model, and its weights as far as they are stored already.
    """
    run, (source, stored) = config.output_dir, sources
    found = starting.read_start(run, arch) if RunDirectory(run).exists() else None
    if found is None:
        if adapters is not None:
            return stored, adapters
        start = starting.make_start(source, stored, arch, method, quantization, config.seed)

        def write() -> None:
            if jax.process_index() == 0:
                starting.write_start(run, start, method, arch, config.model.path)

        distributed.together("initial adapter", write)
        found = starting.read_start(run, arch)
    targets, start = found
    if config.lora.init_lora_weights in RESIDUAL:
        stored = starting.with_residual(stored, arch, targets, start)
    return stored, start if adapters is None else adapters


def abstract_model(config: ConfigDict, model_config: Mapping[str, Any], mesh: Mesh) -> PreparedModel:
    """Return what `prepare_model` would, as shapes, dtypes and shardings: to compile for devices that are not there.

    Args:
      config: the whole configuration; `model.path` is not read.
      model_config: the model's Hugging Face config.json, with `model.add_special_tokens` counted in its vocabulary.
      mesh: real devices, or those that a topology describes.
    """
    arch = architecture(model_config)
    check_mesh(arch, mesh)
    # Which tokens are new changes no shape; the last ones stand for them.
    added = range(arch.vocab_size - len(config.model.add_special_tokens), arch.vocab_size)
    method, adapters, quantization = _method(config, arch, added)
    dtype, quantized = storage_dtype(config), quantized_paths(arch.modules(), quantization)
    specs = arch.leaves()
    base = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in arch.leaf_shapes().items()}
    formats = dict.fromkeys(quantized, quantization)
    formats |= stored_formats(model_config, arch.modules())
    for path, how in formats.items():
        base[path] = jax.eval_shape(functools.partial(quantize_weight, config=how), base[path])

    trainable, frozen = jax.eval_shape(lambda params: _split(method, params, adapters, config.seed), base)
    shardings = sharding.shardings(base, specs, mesh)
    trained = sharding.shardings(trainable, method.leaves(specs), mesh)
    trainable = {path: abstract_leaf(leaf, trained[path]) for path, leaf in trainable.items()}
    frozen = {path: jax.tree.map(abstract_leaf, leaf, shardings[path]) for path, leaf in frozen.items()}
    return PreparedModel(None, arch, mesh, method, trainable, frozen, shardings)


def _split(
    method: Method, params: dict[str, Any], adapters: dict[str, Any] | None, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    return method.split(params, method.init(params, jax.random.key(seed)) if adapters is None else adapters)


def abstract_leaf(leaf: Any, leaf_sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return a leaf's shape and dtype, with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding)


def _method(
    config: ConfigDict, arch: Architecture, added_tokens: Iterable[int]
) -> tuple[Method, dict[str, Any] | None, QuantizeConfig]:
    """Return how the model is trained, the adapters to start from, and what is quantized."""
    method, adapters = METHODS[config.method](config, arch, added_tokens)
    quantization = QuantizeConfig(**config.quantize)
    if method.saved and not isinstance(quantization.exclude, str):
        # Modules that are trained in full cannot be quantized.
        saved = [module.path.rsplit(".")[-1] for module in method.saved]
        quantization = dataclasses.replace(quantization, exclude=[*quantization.exclude, *saved])
    return method, adapters, quantization


def put(array: Any, leaf_sharding: NamedSharding) -> jax.Array:
    """Put an array that every process holds in full onto the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(array, leaf_sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, leaf_sharding, lambda index: host[index])
