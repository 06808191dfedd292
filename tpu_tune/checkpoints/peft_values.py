"""The values of a PEFT adapter_config.json, held against what can be worked with before one is read."""

from __future__ import annotations

import re
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.values import FLAG, NOTHING, TEXT, Kind, check, listing, mapping, number, one_of, shown, whole

HIGHEST_RANK = 2**16
_LAYER, _TOKEN = whole(0, 100_000), whole(0, 2**28)
_NAMES = NOTHING | TEXT | listing(TEXT)

_KINDS: dict[str, Kind] = {
    "peft_type": TEXT | NOTHING,
    "r": whole(1, HIGHEST_RANK),
    "lora_alpha": number(),
    "lora_dropout": number(0, 1),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": NOTHING | listing(TEXT),
    "bias": one_of("none", "all", "lora_only"),
    "trainable_token_indices": NOTHING | listing(_TOKEN) | mapping(listing(_TOKEN)),
    "layers_to_transform": NOTHING | _LAYER | listing(_LAYER),
    "layers_pattern": _NAMES,
    "rank_pattern": NOTHING | mapping(whole(1, HIGHEST_RANK)),
    "alpha_pattern": NOTHING | mapping(number()),
    **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying", "fan_in_fan_out"), FLAG | NOTHING),
}


def check_adapter_config(file: str, config: Any) -> None:
    """Hold the content of an adapter_config.json against its kinds: types, ranges, and patterns that are patterns.

    Raises:
      UserError: it is no object, or a value is of another kind; key and value are named.
    """
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds {shown(config)} where a JSON object is expected")
    if config.get("peft_type") != "LORA":
        return  # the reader refuses it by its kind, whose keys are others
    check(config, _KINDS, file)
    layers = config.get("layers_pattern") or ()
    patterns = {
        "rank_pattern": config.get("rank_pattern") or (),
        "alpha_pattern": config.get("alpha_pattern") or (),
        "layers_pattern": [layers] if isinstance(layers, str) else layers,
    }
    for key, entries in patterns.items():
        for pattern in entries:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"{file}: '{key}' has {shown(pattern)}, no regular expression: {error}") from None
