"""`tpu-tune hf`: run a Hugging Face training script's command line, or the one in a bash script, as a tpu_tune run."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from tpu_tune import config as configuration
from tpu_tune.cli import train
from tpu_tune.cli.common import Commands, join_hosts, stdout_for_json
from tpu_tune.cli.memory_check import as_planned, check_memory
from tpu_tune.errors import UserError

_ABOUT = """
Every other argument is a flag of the script: of Hugging Face's TrainingArguments, of qlora.py, of the PygmalionAI
training code, or of TRL's DPO, ORPO, CPO and KTO (`trl dpo`, `orpo.py`: the script says which), with dashes or
underscores. A launcher before the flags, such as `accelerate launch ./train.py`, is ignored. Flags of
TrainingArguments that are not given have Hugging Face's defaults, also where qlora.py has others (a line names these);
flags that only qlora.py or the training code has, have the defaults of that script. tpu-tune chooses by itself what
changes no result (recomputing layers, attention kernels), unless a flag sets it. --config.KEY=VALUE overrides flags.
"""

# Variables that a bash script may export for the run.
_EXPORTED = "WANDB_PROJECT WANDB_NAME WANDB_MODE HF_DATASETS_CACHE HF_HOME HF_HUB_CACHE TPU_TUNE_CACHE".split()


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "hf",
        run,
        "run a Hugging Face training script's command line unchanged",
        "tpu-tune hf accelerate launch ./train.py --model_name_or_path DIR --train_file chats.jsonl "
        "--output_dir out --bf16 true --use_lora",
    )
    parser.description += _ABOUT
    parser.allow_abbrev = False
    parser.usage = "tpu-tune hf [options] [LAUNCHER SCRIPT] --FLAG VALUE ..."
    parser.add_argument("--script", metavar="FILE.sh", help="read the flags from a bash script, without running it")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the configuration and stop")
    parser.add_argument(
        "--write-config",
        "--write_config",
        metavar="FILE.py",
        help="write the configuration to a file for tpu-tune train --config",
    )
    parser.add_argument(
        "--flags", action="store_true", dest="list_flags", help="list every flag and what it is translated to"
    )
    parser.add_argument("--no-check", action="store_true", help="start without checking first whether the job fits")
    # The parser puts arguments that it does not know into `rest`; `config` makes it accept --config.KEY=VALUE.
    parser.set_defaults(rest=[], config=None)


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from tpu_tune.cli.hf import command_line, listing

    if options.list_flags:
        print("\n".join(listing.all_flags()))
        return 0
    words, exported, other_commands = _words(options)
    flags = command_line.parse(words)
    if flags.get("use_cpu"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # before jax looks for devices
    if not options.dry_run:
        join_hosts()
    translation = _translate(flags, exported, options)
    if options.write_config:
        listing.write_config(translation.config, options.write_config)
    if options.dry_run and options.json:
        print(json.dumps(listing.as_json(translation), indent=2))
        return 0
    with stdout_for_json(options.json):
        if options.dry_run or _is_main_process():
            print("\n".join(listing.lines(translation, flags, other_commands)), flush=True)
    return 0 if options.dry_run else _start(translation, options)


def _words(options: argparse.Namespace) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the script's arguments, the variables that it sets, and its other commands, which are not run."""
    from tpu_tune.cli.hf.bash_script import read_script

    words, exported, other_commands = list(options.rest), {}, []
    if options.script:
        script_words, exported, other_commands = read_script(options.script)
        words = script_words + words  # flags on our own line come last, so that they win
    if not words:
        raise UserError("no flags; give those of a script, or --script FILE.sh (see tpu-tune hf --help)")
    return words, exported, other_commands


def _translate(flags: Any, exported: dict[str, str], options: argparse.Namespace) -> Any:
    """Return the translation with --config.KEY=VALUE applied; set the environment variables that it asks for."""
    from tpu_tune.cli.hf.data_flags import check_answers, fit_max_length
    from tpu_tune.cli.hf.translate import translate
    from tpu_tune.training.opening import check_settings

    translation = translate(flags, _platform, {**os.environ, **exported})
    os.environ.update({name: exported[name] for name in _EXPORTED if name in exported} | translation.environ)
    for key, value in options.overrides:
        configuration.assign(translation.config, key, value)
    check_settings(translation.config, with_data=False)  # what a run refuses, a dry run refuses too
    check_answers(flags, translation.config)
    if translation.derived_length and "data.max_length" not in dict(options.overrides):
        translation.notes += fit_max_length(translation.config)
    return translation


def _start(translation: Any, options: argparse.Namespace) -> int:
    if translation.train:
        figures = check_memory(translation.config, translation.max_memory, not options.no_check)
        config, facts = as_planned(translation.config, figures)
        return train.start(config, options.json, facts)
    from tpu_tune.training import distributed
    from tpu_tune.training.evaluate_only import evaluate_only

    with stdout_for_json(options.json), distributed.leaving_alone():
        metrics = evaluate_only(translation.config)
    if options.json:
        print(json.dumps(metrics))
    return 0


def _platform() -> str:
    import jax

    return jax.default_backend()


def _is_main_process() -> bool:
    import jax

    return jax.process_index() == 0
