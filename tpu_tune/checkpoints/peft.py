"""PEFT adapter directories: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Files are what `peft` 0.21 writes and reads (`utils/save_and_load.py`), with few and old keys so that older versions
read them too. Matrices are transposed between PEFT's (rank, in) and (out, rank) and the tree's (in, rank) and
(rank, out), layers are stacked, and zero padding of uneven ranks never reaches a file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - teaches NumPy bfloat16, which safetensors needs
import numpy as np
from safetensors.numpy import load, load_file, save_file

from tpu_tune.checkpoints import expert_adapters, json_text, storage, tower_adapters
from tpu_tune.checkpoints.ends import write_closing_end
from tpu_tune.checkpoints.peft_values import check_adapter_config
from tpu_tune.checkpoints.vocabulary import write_record
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError, counted
from tpu_tune.models import Architecture
from tpu_tune.tensors import Module
from tpu_tune.transforms import LoraConfig, Target, Targets, find_targets
from tpu_tune.transforms.select import by_pattern

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
_NEOX_HEAD = ("embed_out", "lm_head")  # in files of weights; as transformers 5, and thus PEFT, calls it in memory
_TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
# Keys of adapter_config.json that change the mathematics and are not implemented; other unknown keys are ignored.
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
    "lora_bias", "lora_ga_config", "loftq_config", "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_INITIAL_ONLY = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")  # they only shape the initial values
# Values of init_lora_weights that leave the base as it is; what else they do is over when the adapter is saved.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
# Those with which PEFT changes the base too, and does so again on loading (`adapter_base` redoes it).
REDONE_STARTS = ("pissa", "olora")
# Those whose changed base cannot be had again from the adapter and the original, and why.
_LOST_STARTS = {
    "pissa_niter_": "its decomposition is drawn at random",
    "corda": "it needs the covariances of the texts it was made with",
    "loftq": "it is an approximation of the base by quantized weights that the adapter does not hold",
    "lora_ga": "it needs the gradients it was made with",
}


def write_adapter(
    directory: str,
    trainable: Mapping[str, Any],
    targets: Targets,
    architecture: Architecture,
    base_name: str,
    params: Mapping[str, Any] | None = None,
    source: WeightSource | None = None,
) -> None:
    """Write a PEFT adapter; an existing one is replaced only when the new one is complete.

    Args:
      directory: the directory to write.
      trainable: the trained tree (float32).
      targets: the modules that it adapts.
      architecture: the base model's facts.
      base_name: `base_model_name_or_path`.
      params: the base tree; where embeddings or head are targeted, their weights are written beside the adapter as
        PEFT's `save_embedding_layers="auto"` does, if it is given.
      source: the opened base model; the tokenizer is written too if its tokens or its chat template are not the base's.

    Raises:
      UserError: the directory cannot be written.
    """
    with storage.whole_directory(directory) as aside:
        if unread := expert_adapters.unread_by_peft(targets, architecture):
            logger.warning(
                "%s: peft 0.21 leaves out the adapters on %s beside those on the experts; tpu_tune reads all",
                directory,
                ", ".join(unread),
            )
        experts = expert_adapters.stacked(targets, architecture)
        others = _without(targets, experts) if experts else targets
        tensors = {
            name.replace(*(f".{part}." for part in _NEOX_HEAD)): value
            for name, value in adapter_tensors(trainable, others, architecture, params).items()
        }
        config = adapter_config(others, base_name, architecture)
        if experts:
            more, settings = expert_adapters.stacked_form(experts, trainable, targets, architecture, PREFIX)
            tensors |= more
            config |= {key: config[key] | value if key in config else value for key, value in settings.items()}
        save_file(tensors, os.path.join(aside, WEIGHTS), metadata={"format": "pt"})
        with open(os.path.join(aside, "adapter_config.json"), "w", encoding="utf-8") as stream:
            json.dump(config, stream, indent=2, sort_keys=True)
        if source is not None:
            write_record(aside, source)
            write_closing_end(aside, source)


def _without(targets: Targets, experts: Sequence[Target]) -> Targets:
    """Return the targets without some, the others by their own names."""
    spec = dataclasses.replace(targets.spec, target_modules="")
    return dataclasses.replace(targets, adapted=tuple(one for one in targets.adapted if one not in experts), spec=spec)


def adapter_config(targets: Targets, base_name: str, architecture: Architecture) -> dict[str, Any]:
    """Return the content of `adapter_config.json`."""
    spec = targets.spec
    names = spec.target_modules
    if not isinstance(names, str) or names in ("all-linear", ""):
        # Short names, unless they would catch a module that is not meant.
        names = sorted({target.module.path.rsplit(".")[-1] for target in targets.adapted})
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if architecture.num_labels else "SEQ_2_SEQ_LM" if architecture.encoder else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": _whole(spec.alpha),
        "lora_dropout": spec.dropout,
        "target_modules": _renamed(names, *_NEOX_HEAD),
        "bias": spec.bias,
        "modules_to_save": _renamed(list(spec.modules_to_save), *_NEOX_HEAD) or None,
        "fan_in_fan_out": any(target.module.fan_in_fan_out for target in targets.adapted),
        "layers_to_transform": list(spec.layers_to_transform) or None,
        "layers_pattern": spec.layers_pattern or None,
        "rank_pattern": _in_any_order(spec.rank_pattern, spec.rank, targets),
        "alpha_pattern": {
            key: _whole(value) for key, value in _in_any_order(spec.alpha_pattern, spec.alpha, targets).items()
        },
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "init_lora_weights": True if spec.init_lora_weights == "true" else spec.init_lora_weights,
    }
    if targets.tokens:
        config["trainable_token_indices"] = _token_indices(targets)
    if architecture.names.tower:
        return config | tower_adapters.exact_settings(targets, architecture)
    if spec.exclude_modules:
        exclude = spec.exclude_modules
        config["exclude_modules"] = exclude if isinstance(exclude, str) else list(exclude)
    return config


def _in_any_order(table: Mapping[str, Any], default: Any, targets: Targets) -> dict[str, Any]:
    """Return a rank_pattern or alpha_pattern that gives every adapted layer its value in whatever order it is read.

    The first key that matches a name counts, and PEFT sorts the keys. Where several keys match a name and differ, or
    none does under PEFT's name of it, each layer gets a key of its own.
    """
    values = {
        _renamed([name], *_NEOX_HEAD)[0]: by_pattern(table, name, default)
        for target in targets.adapted
        for name in target.names
    }
    for name, value in values.items():
        matching = {entry for key, entry in table.items() if by_pattern({key: True}, name, False)}
        if (matching or {default}) != {value}:
            return {re.escape(name): value for name, value in values.items() if value != default}
    return dict(table)


def _token_indices(targets: Targets) -> list[int] | dict[str, list[int]]:
    """Return `trainable_token_indices` with each module's name as PEFT matches it: the end of it is enough."""
    if not isinstance(targets.spec.trainable_token_indices, Mapping):
        return list(targets.tokens[0].ids)
    names = _renamed([rows.module.path.rsplit(".")[-1] for rows in targets.tokens], *_NEOX_HEAD)
    return {name: list(rows.ids) for name, rows in zip(names, targets.tokens, strict=True)}


def adapter_tensors(
    trainable: Mapping[str, Any], targets: Targets, architecture: Architecture, params: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Return PEFT's tensor names and arrays for a trained tree."""
    tensors: dict[str, np.ndarray] = {}
    has_embedding = False
    for target in targets.adapted:
        module = target.module
        a, b = (np.asarray(trainable[path]) for path in (target.a_path, target.b_path))
        magnitude = trainable.get(target.magnitude_path)
        for name, index, rank in target.places:
            a_one, b_one = a[index], b[index]
            form = (
                ("lora_embedding_A", "lora_embedding_B")
                if module.kind == "embedding"
                else ("lora_A.weight", "lora_B.weight")
            )
            tensors[f"{PREFIX}{name}.{form[0]}"] = np.ascontiguousarray(a_one[:, :rank].T)
            tensors[f"{PREFIX}{name}.{form[1]}"] = np.ascontiguousarray(module.deinterleave(b_one[:rank]).T)
            if magnitude is not None:
                one = np.asarray(magnitude)[index]
                suffix = "" if module.kind == "embedding" else ".weight"
                tensors[f"{PREFIX}{name}.lora_magnitude_vector{suffix}"] = np.ascontiguousarray(
                    module.deinterleave(one)
                )
        has_embedding |= module.kind == "embedding" or module.is_head
    for rows in targets.tokens:
        tensors[f"{PREFIX}{rows.module.path}.{_TOKEN_ROWS}"] = np.ascontiguousarray(np.asarray(trainable[rows.path]))
    tensors |= _whole_modules(trainable, targets, architecture)
    if has_embedding and params is not None:
        for module in architecture.modules():
            adapted = any(target.module is module or target.module == module for target in targets.adapted)
            if adapted and (module.kind == "embedding" or module.is_head):
                source = f"{module.tied_to}.weight" if module.tied_to else module.weight
                value = np.asarray(params[source])
                transposed = module.is_head and not module.tied_to
                tensors[f"{PREFIX}{module.path}.base_layer.weight"] = np.ascontiguousarray(
                    value.T if transposed else value
                )
    return tensors


def _whole_modules(trainable: Mapping[str, Any], targets: Targets, architecture: Architecture) -> dict[str, np.ndarray]:
    """Return saved modules and biases, which PEFT stores as plain weights."""
    tensors = {}
    adapted = {target.module.path for target in targets.adapted}
    for module in architecture.modules():
        for suffix in ("weight", "bias"):
            path = f"{module.path}.{suffix}"
            if path not in trainable:
                continue
            value = np.asarray(trainable[path])
            for index, name in enumerate(module.names()):
                one = value[index] if module.layers else value
                one = module.to_torch(one) if suffix == "weight" else module.deinterleave(one)
                inner = ".base_layer" if suffix == "bias" and module.path in adapted else ""
                tensors[PREFIX + module.tensor_name(name + inner, suffix)] = np.ascontiguousarray(one)
    return tensors


def read_adapter(
    directory: str, architecture: Architecture, over_its_base: bool = False
) -> tuple[LoraConfig, dict[str, Any]]:
    """Read a PEFT directory into a spec and the trainable tree that `split` takes.

    Args:
      directory: what PEFT or `write_adapter` wrote.
      architecture: the base model's facts.
      over_its_base: the weights are those of `adapter_base.base_of_adapter`. Without it, an adapter that belongs to
        other weights than the model's is refused.

    Raises:
      UserError: files missing or broken, an adapter of another kind or model, or a setting that is not implemented.
    """
    file = os.path.join(directory, WEIGHTS)
    spec, tensors = read_files(directory, architecture)
    if not over_its_base:
        _check_base(file, spec, architecture, tensors)
    try:
        targets = find_targets(architecture.modules(), spec, architecture.default_targets)
    except UserError as error:  # its keys are PEFT's, and the adapter's own
        raise UserError(
            f"{directory}: this adapter does not fit the model: {str(error).removeprefix('lora.')}"
        ) from None
    _check_tying(directory, architecture, targets)
    trainable: dict[str, Any] = {}
    used: set[str] = set()

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        for key in (
            PREFIX + name,
            PREFIX + name.replace(".base_layer.bias", ".bias"),
            PREFIX + name.removesuffix(".weight"),
        ):
            if key in tensors:
                used.add(key)
                if tensors[key].shape != shape:
                    raise UserError(f"{file}: '{key}' has shape {tensors[key].shape}, the base model asks for {shape}")
                return np.asarray(tensors[key], np.float32)
        raise UserError(f"{file}: '{PREFIX}{name}' is missing")

    for target in targets.adapted:
        trainable |= _read_target(target, spec, take)
    for rows in targets.tokens:
        shape = (len(rows.ids), rows.module.shape[0 if rows.module.is_head else 1])
        trainable[rows.path] = jnp.asarray(take(f"{rows.module.path}.{_TOKEN_ROWS}", shape))
    expected = {path: module for module in architecture.modules() for path in (module.weight, f"{module.path}.bias")}
    wanted = [path for module in targets.saved for path in module.leaves()]
    adapted = {target.module.path for target in targets.adapted}
    for path in [*wanted, *targets.biases]:
        trainable[path] = _read_whole(expected[path], path, take, expected[path].path in adapted)
    used |= saved_embeddings(architecture, spec, tensors).keys()
    used |= tower_adapters.checked_left_aside(file, architecture, tensors, PREFIX, over_its_base)
    copies = (".base_layer.", ".modules_to_save.")  # the latter twice, as the embedding and as the module saved
    left = [key for key in tensors if key not in used and not any(part in key for part in copies)]
    if left:
        raise UserError(
            f"{file}: {counted(len(left), 'tensor does', 'tensors do')} not belong to a LoRA of this model, e.g. "
            f"'{left[0]}'"
        )
    return spec, trainable


def read_files(directory: str, architecture: Architecture) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Read an adapter's settings and tensors, both under the names that the model's files have.

    Raises:
      UserError: files missing or broken, or a setting that is not implemented.
    """
    spec = read_spec(directory)
    back = _NEOX_HEAD[::-1] if architecture.names.head == _NEOX_HEAD[0] else ("", "")
    tokens = spec.trainable_token_indices
    if isinstance(tokens, Mapping):
        tokens = dict(zip(_renamed(list(tokens), *back), tokens.values(), strict=True))
    spec = dataclasses.replace(
        spec,
        target_modules=_renamed(spec.target_modules, *back),
        modules_to_save=_renamed(spec.modules_to_save, *back),
        trainable_token_indices=tokens,
        rank_pattern=_renamed_keys(spec.rank_pattern, *back),
        alpha_pattern=_renamed_keys(spec.alpha_pattern, *back),
    )
    file = os.path.join(directory, WEIGHTS)
    if not storage.exists(file):
        pickled = storage.exists(os.path.join(directory, "adapter_model.bin"))
        hint = " (adapter_model.bin is there: convert it to safetensors with peft)" if pickled else ""
        raise UserError(f"{file}: there is no such file{hint}")
    try:
        tensors = load(storage.read_bytes(file)) if storage.is_remote(file) else load_file(file)
    except Exception as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    config = json_text.loads(storage.read_bytes(os.path.join(directory, "adapter_config.json")))
    spec, tensors = expert_adapters.as_here(directory, config, spec, tensors, architecture)
    if architecture.names.tower:
        return tower_adapters.as_here(spec, tensors, PREFIX, architecture)
    if any(back):
        tensors = {name.replace(*(f".{part}." for part in back)): value for name, value in tensors.items()}
    return spec, tensors


def saved_embeddings(
    architecture: Architecture, spec: LoraConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, Module]:
    """Return tensor name -> module of the embedding and head weights of the base that PEFT saved with an adapter.

    PEFT does so where tokens were added (`save_embedding_layers`), and where an adapter stands on them.
    """
    named = {}
    for module in architecture.modules():
        if module.path == architecture.names.embed or (module.is_head and not architecture.num_labels):
            saved = is_saved(module, spec)
            for inner in (".original_module",) if saved else ("", ".base_layer", ".token_adapter.base_layer"):
                named[f"{PREFIX}{module.path}{inner}.weight"] = module
    return {name: module for name, module in named.items() if name in tensors}


def _check_base(file: str, spec: LoraConfig, architecture: Architecture, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuse an adapter that belongs to other weights than the model's.

    Raises:
      UserError: PEFT re-derives its base, or it has embeddings of its own.
    """
    hint = "it can be used (generate, eval, tpu_tune.load), not trained on; merge it with peft's merge_and_unload first"
    if spec.init_lora_weights in REDONE_STARTS:
        raise UserError(f"{file}: init_lora_weights='{spec.init_lora_weights}' changes the weights of its base; {hint}")
    for name, module in saved_embeddings(architecture, spec, tensors).items():
        rows, size = tensors[name].shape[0], architecture.vocab_size
        if rows != size or name == f"{PREFIX}{module.path}.weight":
            raise UserError(
                f"{file}: '{name}' replaces the whole '{module.path}' of the base ({rows} rows for its {size}; peft "
                f"saves it where tokens were added); {hint}"
            )


def is_saved(module: Module, spec: LoraConfig) -> bool:
    """Return whether `modules_to_save` names a module."""
    return any(module.path.endswith(name) for name in spec.modules_to_save)


def _check_tying(directory: str, architecture: Architecture, targets: Targets) -> None:
    """Refuse `ensure_weight_tying` where it would have embedding and head share what is trained.

    Raises:
      UserError: it is set, the model is tied, and one of them is trained.
    """
    config = json_text.loads(storage.read_bytes(os.path.join(directory, "adapter_config.json")))
    trained = [target.module for target in targets.adapted] + list(targets.saved)
    for module in trained if config.get("ensure_weight_tying") and architecture.tied else []:
        if module.path == architecture.names.embed or module.is_head:
            raise UserError(
                f"{directory}: 'ensure_weight_tying' has embedding and head share the training of '{module.path}', "
                "which is not implemented here; merge it with peft's merge_and_unload"
            )


def _start(file: str, how: Any) -> str:
    """Return what `init_lora_weights` means here: `true`, `gaussian`, or one of `REDONE_STARTS`.

    Raises:
      UserError: its base cannot be re-derived, or it is not known.
    """
    name = how.lower() if isinstance(how, str) else how
    for start, reason in _LOST_STARTS.items():
        if isinstance(name, str) and name.startswith(start):
            raise UserError(
                f"{file}: init_lora_weights '{how}' changes the weights of its base, and they cannot be derived again: "
                f"{reason}; convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...), or, "
                "where model.path is the changed base, set init_lora_weights to true"
            )
    if name in REDONE_STARTS or name == "gaussian":
        return name
    if name is None or isinstance(name, bool) or name in _PLAIN_STARTS:
        return "true"
    raise UserError(f"{file}: init_lora_weights {how!r} is not known here; peft may change the base with it")


def read_spec(directory: str) -> LoraConfig:
    """Read `adapter_config.json`.

    Raises:
      UserError: it is missing or broken, or sets something that changes the mathematics and is not implemented.
    """
    file = os.path.join(directory, "adapter_config.json")
    try:
        config = json_text.loads(storage.read_bytes(file))
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file; an adapter is a directory that peft has written") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    check_adapter_config(file, config)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')}; only LORA is implemented")
    for key in _REFUSED:
        if config.get(key) and key not in _INITIAL_ONLY:
            raise UserError(f"{file}: '{key}' is set and not implemented here")
    saved = config.get("modules_to_save") or ()
    if config.get("task_type") == "SEQ_CLS":  # PEFT names the heads of all models, and passes over those not there
        saved = [name for name in saved if name != "classifier"]
    layers = config.get("layers_to_transform")
    pattern = config.get("layers_pattern") or ""
    return LoraConfig(
        rank=config.get("r", 8),
        alpha=float(config.get("lora_alpha", 8)),
        dropout=float(config.get("lora_dropout", 0.0)),
        target_modules=config.get("target_modules") or "",
        exclude_modules=config.get("exclude_modules") or (),
        bias=config.get("bias", "none"),
        modules_to_save=saved,
        trainable_token_indices=config.get("trainable_token_indices") or (),
        layers_to_transform=([layers] if isinstance(layers, int) else layers) or (),
        layers_pattern=pattern if isinstance(pattern, str) else "|".join(pattern),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        init_lora_weights=_start(file, config.get("init_lora_weights", True)),
    )


def _read_target(target: Target, spec: LoraConfig, take: Any) -> dict[str, Any]:
    module = target.module
    inner, outer = module.shape
    form = (
        ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    )
    stack = (len(target.layers),) * bool(target.layers) + (module.experts,) * bool(module.experts)
    parts = {
        target.a_path: np.zeros((*stack, inner, target.rank), np.float32),
        target.b_path: np.zeros((*stack, target.rank, outer), np.float32),
    }
    lead = module.stacked_in_file
    if spec.use_dora:
        parts[target.magnitude_path] = np.zeros((*stack, outer), np.float32)
    for name, index, rank in target.places:
        a, b = (take(f"{name}.{form[0]}", (*lead, rank, inner)), take(f"{name}.{form[1]}", (*lead, outer, rank)))
        parts[target.a_path][index][..., :rank] = np.swapaxes(a, -1, -2)
        parts[target.b_path][index][..., :rank, :] = module.interleave(np.swapaxes(b, -1, -2))
        if spec.use_dora:
            taken = take(f"{name}.lora_magnitude_vector.weight", (outer,))
            parts[target.magnitude_path][index] = module.interleave(taken)
    return {path: jnp.asarray(array) for path, array in parts.items()}


def _read_whole(module: Module, path: str, take: Any, adapted: bool) -> Any:
    suffix = path.rsplit(".", 1)[1]
    shape = module.torch_shape if suffix == "weight" else module.stacked_in_file + module.shape[-1:]
    inner = ".base_layer" if suffix == "bias" and adapted else ""
    values = [take(module.tensor_name(name + inner, suffix), shape) for name in module.names()]
    values = [module.from_torch(value) if suffix == "weight" else module.interleave(value) for value in values]
    return jnp.asarray(np.stack(values) if module.layers else values[0])


def _renamed(names: Any, old: str, new: str) -> Any:
    """Return a list of module names with one of them exchanged; a regular expression stays as it is."""
    return names if isinstance(names, str) else [new if name == old else name for name in names]


def _renamed_keys(table: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return dict(zip(_renamed(list(table), old, new), table.values(), strict=True))


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
