"""Flags of TRL's trainers on rated answers (DPO, ORPO, CPO with SimPO, KTO), and LLaMA-Factory's for the same.

Which trainer a command line is for, its script says (`trl dpo`, `python dpo.py`), `--stage`, or a loss type that only
one has.
"""

from __future__ import annotations

import re

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.cli.hf.command_line import ScriptFlags
from tpu_tune.data.preferences import PAIRED, ROWS, learns_from
from tpu_tune.errors import UserError
from tpu_tune.training.preference_settings import DPO_LOSSES, LOSS_TYPES

_SCRIPT = re.compile(r"(?<![a-z])(?<!online_)(dpo|orpo|simpo|cpo|kto)(?![a-z])", re.IGNORECASE)
_STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto"}  # LLaMA-Factory's
_OF_SFT = ("nll", "chunked_nll")  # TRL's loss types of its SFTTrainer that are plain cross-entropy
_LEARNING_RATE, _LENGTH = 1e-6, 1024  # TRL's defaults, where the Trainer has others
# Flag -> the config key that takes its value.
_KEYS = {
    "beta": "beta", "loss_weights": "loss_weights", "label_smoothing": "label_smoothing", "rpo_alpha": "sft_weight",
    "simpo_gamma": "simpo_gamma", "cpo_alpha": "cpo_alpha", "desirable_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight", "ref_model": "reference",
}  # fmt: skip


def set_objective(flags: ScriptFlags, config: ConfigDict) -> bool:
    """Set `objective`, and of other keys those that TRL's trainers have other defaults of.

    Args:
      config: its data, lengths, method and learning rate are set already.

    Returns:
      Whether data.max_length was set.

    Raises:
      UserError: flags of no trainer or of several, or a value that makes no sense.
    """
    types = [name for name in flags.get("loss_type", []) if name not in _OF_SFT]
    name = _objective(flags, types)
    given = [flag for flag in _KEYS if flag in flags.values]
    if learns_from(name) == ROWS:
        if given or types:
            flag = (given or ["loss_type"])[0]
            raise UserError(
                f"{flags.spelled(flag)} is a flag of TRL's trainers on rated answers: say which with its script before "
                "the flags (trl dpo, orpo.py, cpo.py, kto.py), or with --stage dpo or --stage kto"
            )
        return False
    objective = config.objective
    objective.name = name
    if types and name in LOSS_TYPES:
        objective.loss_type = types if len(types) > 1 else types[0]
    for flag in given:
        try:
            configuration.assign(config, f"objective.{_KEYS[flag]}", flags.get(flag))
        except UserError as error:
            raise UserError(f"{flags.spelled(flag)}: {error}") from None
    if name == "simpo" and "cpo_alpha" not in given:
        flags.note("SimPO: without a cross-entropy of the chosen answers, as with --cpo_alpha 0")
    if "learning_rate" not in flags.values:
        config.train.learning_rate = _LEARNING_RATE
        flags.note(f"--learning_rate is not given: {_LEARNING_RATE:g}, TRL's default for rated answers")
    if flags.get("disable_dropout", True) and config.lora.dropout:
        config.lora.dropout = 0.0
        flags.note("no dropout, as TRL turns it off for rated answers (--disable_dropout false leaves it on)")
    if flags.get("dataset_format", "hh-rlhf") == "hh-rlhf":
        config.data.format, config.data.columns = "auto", {}
    _set_lengths(flags, config)
    return True


def _objective(flags: ScriptFlags, types: list[str]) -> str:
    """The objective's name; "sft" where no flag and no script says another."""
    found = [word.lower() for word in _SCRIPT.findall(flags.launcher)]
    stage = flags.get("stage")
    if stage is not None and stage not in _STAGES:
        raise UserError(f"{flags.spelled('stage')} is '{stage}'; it must be one of {', '.join(_STAGES)}")
    name = _STAGES.get(stage, found[-1] if found else "sft")
    if name in ("sft", "dpo") and len(types) == 1 and types[0] not in DPO_LOSSES:
        # LLaMA-Factory has ORPO and SimPO as losses of its stage dpo; TRL has names that only one trainer knows.
        name = {"orpo": "orpo", "simpo": "simpo", "kto": "kto", "apo_zero_unpaired": "kto"}.get(types[0], name)
        if stage is None and name in LOSS_TYPES and name != "dpo":
            flags.note(f"{flags.spelled('loss_type')} {types[0]}: the objective is {name}")
    if name == "cpo" and types == ["simpo"] and not flags.get("cpo_alpha", 1.0):
        return "simpo"
    return name


def _set_lengths(flags: ScriptFlags, config: ConfigDict) -> None:
    """TRL's max_length is of one answer with its prompt; both answers of a pair stand in one row here."""
    length = flags.get("max_length") or _LENGTH
    paired = learns_from(config.objective.name) == PAIRED
    config.data.max_length = 2 * length if paired else length
    default = "" if flags.get("max_length") else ", TRL's default"
    if paired:
        flags.note(
            f"--max_length {length}{default}: rows of {2 * length} tokens, for both answers with their prompts; a pair "
            "that is longer is left out and counted, not cut"
        )
    for flag, key in (("max_prompt_length", "source_max_len"), ("max_completion_length", "target_max_len")):
        if flags.get(flag):
            config.data[key] = flags.get(flag)
            flags.note(f"{flags.spelled(flag)}: texts are cut on the right; chats are not cut by it")
