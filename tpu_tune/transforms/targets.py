"""Which modules LoRA trains: `find_targets` resolves a `LoraConfig` against a model's modules, by PEFT's rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tpu_tune.config import LoraConfig, TokenIndices
from tpu_tune.errors import UserError
from tpu_tune.tensors import Module
from tpu_tune.transforms.lora import Target, Targets, TokenRows
from tpu_tune.transforms.select import ALL_LINEAR, by_pattern, choose, targeted

_NO_SELECTION = "lora.bias=lora_only together with a selection of layers is not implemented; use none or all"


def find_targets(modules: Sequence[Module], config: LoraConfig, default_targets: Sequence[str] = ()) -> Targets:
    """Resolve LoRA settings against a model's modules.

    Args:
      modules: the model's modules.
      config: the LoRA settings.
      default_targets: the names that an empty `target_modules` means: PEFT's table for the family.

    Raises:
      UserError: a name that matches nothing (the choices are listed), a norm as a target, or settings that exclude each
        other.
    """
    pattern = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    is_all = pattern in (ALL_LINEAR, [ALL_LINEAR])
    chosen = targeted(
        [module for module in modules if not (module.no_adapter or module.by_name)] if is_all else modules,
        pattern or list(default_targets),
        exclude=config.exclude_modules,
        also_exclude=list(config.modules_to_save),
        layers=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    by_path = {module.path: module for module in modules}
    adapted = tuple(_target(by_path[path], layers, config) for path, layers in chosen.items())
    saved = _saved(modules, config, chosen)
    tokens = token_rows(modules, config.trainable_token_indices)
    _check_tokens(modules, tokens, saved, chosen)
    return Targets(adapted, tuple(saved), _biases(modules, config, saved, chosen), config, tokens)


def experts_words(modules: Sequence[Module], targets: Targets) -> str:
    """Return which experts carry adapters and which stay as they are, in words; "" where there are none."""
    adapted = {target.module.path for target in targets.adapted}
    found: dict[str, list[str]] = {}
    for module in modules:
        if module.experts:
            found.setdefault("adapted" if module.path in adapted else "without an adapter", []).append(module.path)
    if not found:
        return ""
    count = next(module.experts for module in modules if module.experts)
    parts = [f"{words}: {', '.join(paths)}" for words, paths in sorted(found.items())]
    return f"{count} experts a layer, {'; '.join(parts)}"


def _target(module: Module, layers: tuple[int | None, ...], config: LoraConfig) -> Target:
    if not module.is_matrix:
        what = "the norm " if module.kind == "norm" else ""
        raise UserError(
            f"lora.target_modules matches {what}'{module.path}', which has no matrix to adapt; "
            "put it in lora.modules_to_save to train it in full"
        )
    if module.no_adapter:
        raise UserError(f"lora.target_modules: '{module.path}' cannot carry an adapter: {module.no_adapter}")
    if module.experts:
        _check_of_experts(module, config)
    ranks = tuple(int(_of_layer("rank_pattern", config, module, layer, config.rank)) for layer in layers)
    alphas = tuple(float(_of_layer("alpha_pattern", config, module, layer, config.alpha)) for layer in layers)
    scales = tuple(
        alpha / (math.sqrt(rank) if config.use_rslora else rank) for alpha, rank in zip(alphas, ranks, strict=True)
    )
    return Target(module, tuple(layer for layer in layers if layer is not None), ranks, alphas, scales)


def _of_layer(key: str, config: LoraConfig, module: Module, layer: int | None, default: float) -> float:
    """Return a layer's value of `rank_pattern` or `alpha_pattern`, which its experts share.

    Raises:
      UserError: the experts of a layer differ.
    """
    found = {by_pattern(getattr(config, key), name, default) for name in module.names_of(layer)}
    if len(found) > 1:
        raise UserError(
            f"lora.{key} gives the experts of '{module.name(layer)}' different values; they stand in one array and "
            "have one: leave out the expert's index"
        )
    return found.pop()


def _check_of_experts(module: Module, config: LoraConfig) -> None:
    """Refuse what adapters on experts cannot do, in PEFT neither.

    Raises:
      UserError: dropout or DoRA is asked for.
    """
    instead = "or leave the experts out with lora.exclude_modules"
    if config.dropout:
        raise UserError(
            f"lora.dropout={config.dropout:g}: the adapters on the experts '{module.path}' have no dropout (PEFT's "
            f"have none either); set lora.dropout=0, {instead}"
        )
    if config.use_dora:
        raise UserError(f"lora.use_dora: there is no DoRA on the experts '{module.path}'; set it to False, {instead}")


def _saved(modules: Sequence[Module], config: LoraConfig, chosen: Mapping[str, tuple]) -> list[Module]:
    """Return the modules that `modules_to_save` names."""
    by_path = {module.path: module for module in modules}
    saved: list[Module] = []
    for name in config.modules_to_save:
        matched = choose(modules, lambda module, full, name=name: full.endswith(name))  # peft: no dot needed before it
        if not matched:
            names = ", ".join(dict.fromkeys(module.path.rsplit(".")[-1] for module in modules))
            raise UserError(f"lora.modules_to_save: '{name}' matches no module; choose among {names}")
        for path, layers in matched.items():
            module = by_path[path]
            if len(layers) < len(module.layers):
                raise UserError(f"lora.modules_to_save: '{name}' takes only some layers of '{path}'; name all of them")
            if module.tied_to:
                raise UserError(
                    f"lora.modules_to_save: '{name}' has no weight of its own in this model, it is tied to "
                    f"'{module.tied_to}'; target it with LoRA, or save that one"
                )
            if module.no_adapter:
                raise UserError(f"lora.modules_to_save: '{path}' cannot carry an adapter: {module.no_adapter}")
            if module.experts:
                raise UserError(
                    f"lora.modules_to_save: '{path}' are experts, which have no trained copy beside the frozen ones; "
                    "target them with LoRA, or train the model in full"
                )
            if path in chosen:
                raise UserError(
                    f"lora.modules_to_save: '{name}' takes '{path}', which has an adapter too; exclude it from one"
                )
            if module not in saved:
                saved.append(module)
    return saved


def _biases(
    modules: Sequence[Module], config: LoraConfig, saved: Sequence[Module], chosen: Mapping[str, tuple]
) -> tuple[str, ...]:
    """Return the paths of the bias leaves that `bias` asks to train."""
    if config.bias == "none":
        return ()
    with_bias = [module for module in modules if module.bias and module not in saved]
    if config.bias == "lora_only":
        with_bias = [module for module in with_bias if module.path in chosen and module.is_matrix]
        if any(len(chosen[module.path]) < len(module.layers) for module in with_bias):
            raise UserError(_NO_SELECTION)
    return tuple(f"{module.path}.bias" for module in with_bias)


def token_rows(modules: Sequence[Module], indices: TokenIndices) -> tuple[TokenRows, ...]:
    """Resolve `trainable_token_indices` as PEFT does: a list is the input embedding's, and a tied head follows it.

    Args:
      modules: the model's modules.
      indices: token ids, or module name (or the end of one) -> token ids.

    Raises:
      UserError: a name that is neither embedding nor head, or an id that is twice or not in the vocabulary.
    """
    key = "lora.trainable_token_indices"
    able = [module for module in modules if module.kind == "embedding" or module.is_head]
    named = indices if isinstance(indices, Mapping) else {able[0].path: indices}
    rows_of: dict[str, TokenRows] = {}
    for name, ids in named.items():
        matched = [module for module in able if module.path.endswith(name)]
        if not matched:
            choices = ", ".join(module.path.rsplit(".")[-1] for module in able)
            raise UserError(f"{key}: '{name}' is neither embedding nor head; choose among {choices}")
        for module in matched if ids else []:
            rows_of[module.path] = TokenRows(module, tuple(ids))
    for rows in rows_of.values():
        module, size = rows.module, rows.module.shape[1 if rows.module.is_head else 0]
        wrong = next((number for number in rows.ids if not 0 <= number < size or rows.ids.count(number) > 1), None)
        if wrong is not None:
            what = "stands there twice" if 0 <= wrong < size else f"is not one of the {size} tokens of '{module.path}'"
            raise UserError(f"{key}: {wrong} {what}")
        if module.no_adapter:
            raise UserError(f"{key}: '{module.path}' cannot carry trained tokens: {module.no_adapter}")
        heads = [head for head in able if head.is_head and head.path in (module.path, *_tied(able, module))]
        if any(head.bias for head in heads):
            raise UserError(
                f"{key}: PEFT's trained tokens leave out the bias of the head '{heads[0].path}'; train it in full "
                "with lora.modules_to_save"
            )
    # A tied head with the same tokens follows its embedding; with others it has rows of its own.
    followed = {path: rows.ids for path, rows in rows_of.items()}
    return tuple(rows for rows in rows_of.values() if followed.get(rows.module.tied_to) != rows.ids)


def _check_tokens(
    modules: Sequence[Module], tokens: Sequence[TokenRows], saved: Sequence[Module], chosen: Mapping[str, tuple]
) -> None:
    for rows in tokens:
        reached = [rows.module.path, *_tied(modules, rows.module)]
        for module in modules:
            if module.path in reached and (module in saved or module.path in chosen):
                which = "modules_to_save" if module in saved else "target_modules"
                raise UserError(
                    "lora.trainable_token_indices (model.train_added_tokens sets it) trains tokens of "
                    f"'{module.path}', which lora.{which} takes too; PEFT can do only one of them: exclude it from one"
                )


def _tied(modules: Sequence[Module], embedding: Module) -> list[str]:
    return [module.path for module in modules if module.tied_to == embedding.path]
