"""Which settings of `objective` belong to which objective; what does not is refused, not passed over."""

from __future__ import annotations

import difflib

import numpy as np
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.data.tokenized_set import CHOSEN, REJECTED
from tpu_tune.errors import UserError

DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "sft",
)  # fmt: skip
LOSS_TYPES = {  # objective -> its loss types, the usual one first
    "dpo": DPO_LOSSES,
    "cpo": ("sigmoid", "hinge", "ipo", "simpo"),
    "kto": ("kto", "apo_zero_unpaired"),
}
_SMOOTHED = {"dpo": ("robust", "exo_pair"), "cpo": ("sigmoid", "simpo")}  # loss types with label_smoothing
# objective -> the keys that it reads, besides `name`
KEYS = {
    "dpo": ("loss_type", "loss_weights", "beta", "label_smoothing", "sft_weight", "reference"),
    "orpo": ("beta",),
    "simpo": ("beta", "simpo_gamma", "label_smoothing"),
    "cpo": ("loss_type", "beta", "label_smoothing", "simpo_gamma", "cpo_alpha"),
    "kto": ("loss_type", "beta", "desirable_weight", "undesirable_weight", "reference"),
}
_EVERY = ("name", "router_aux_loss_coef")  # keys of all objectives
REFERENCED = ("dpo", "kto")  # objectives that compare with a reference model


def loss_types(config: ConfigDict) -> list[str]:
    """Return the loss types of an objective, the usual one where none is named."""
    given = config.objective.loss_type
    given = [given] if isinstance(given, str) else list(given)
    return [name for name in given if name] or [LOSS_TYPES[config.objective.name][0]]


def check(config: ConfigDict) -> None:
    """Check the settings of an objective that exists.

    Raises:
      UserError: a key that the objective does not read, an unknown loss type, or settings that do not go together.
    """
    objective, default = config.objective, configuration.default().objective
    name = objective.name
    if name == "simpo" and objective.cpo_alpha not in (default.cpo_alpha, 0):
        raise UserError(
            f"objective.cpo_alpha={objective.cpo_alpha:g} belongs to CPO, and simpo has no cross-entropy; for "
            "CPO-SimPO set objective.name=cpo with objective.loss_type=simpo"
        )
    if name in KEYS or name == "sft":
        read = (*_EVERY, *KEYS.get(name, ()), *(("cpo_alpha",) if name == "simpo" else ()))
        for key in objective:
            if key not in read and objective[key] != default[key]:
                users = ", ".join(other for other, keys in KEYS.items() if key in keys)
                raise UserError(f"objective.{key} is not read by objective.name={name}; it belongs to {users}")
    if name in LOSS_TYPES:
        _check_loss_types(config)
    if name == "kto" and loss_types(config) == ["kto"] and config.train.per_device_train_batch_size < 2:
        raise UserError(
            "objective.name=kto compares each prompt with the answer of another row of its micro-batch; set "
            "train.per_device_train_batch_size to 2 or more, or objective.loss_type=apo_zero_unpaired"
        )


def unbalanced(config: ConfigDict, roles: np.ndarray) -> list[str]:
    """Return TRL's warning that desirable and undesirable answers do not weigh about the same (kto).

    Args:
      config: the whole configuration.
      roles: those of the answers to train on.
    """
    desirable, undesirable = int(np.sum(roles == CHOSEN)), int(np.sum(roles == REJECTED))
    if desirable == undesirable:
        return []
    weights = config.objective.desirable_weight, config.objective.undesirable_weight
    wanted = max(undesirable, 1) * weights[1] / max(desirable, 1)
    if round(wanted, 2) <= weights[0] <= round(1.33 * wanted, 2):
        return []
    return [
        f"{desirable} desirable and {undesirable} undesirable answers do not weigh the same; with objective."
        f"desirable_weight between {wanted:.2f} and {1.33 * wanted:.2f} they would"
    ]


def _check_loss_types(config: ConfigDict) -> None:
    objective, name = config.objective, config.objective.name
    types, known = loss_types(config), LOSS_TYPES[name]
    for one in types:
        if one not in known:
            near = difflib.get_close_matches(one, known, 1, 0.4)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(f"unknown objective.loss_type '{one}' of {name}; {hint}choose among {', '.join(known)}")
    if len(types) > 1 and name != "dpo":
        raise UserError(f"objective.loss_type: {name} has one loss type, not {len(types)}; only dpo adds several")
    if objective.loss_weights and len(objective.loss_weights) != len(types):
        raise UserError(
            f"objective.loss_weights holds {len(objective.loss_weights)} weights for {len(types)} loss types; give one "
            "each"
        )
    if "exo_pair" in types and not objective.label_smoothing:
        raise UserError("objective.loss_type=exo_pair needs an objective.label_smoothing above 0, for example 1e-3")
    smoothed = _SMOOTHED.get(name, ())
    if objective.label_smoothing and not set(types) & set(smoothed):
        raise UserError(
            f"objective.label_smoothing is not read by loss type {types[0]} of {name}; it belongs to "
            f"{' and '.join(smoothed)}"
        )
    if name == "cpo" and types != ["simpo"] and objective.simpo_gamma != configuration.default().objective.simpo_gamma:
        raise UserError("objective.simpo_gamma belongs to objective.loss_type=simpo; set that, or objective.name=simpo")
