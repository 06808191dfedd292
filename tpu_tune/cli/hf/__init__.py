"""`tpu-tune hf`: the guide's own scripts, unchanged.

flags (or a bash script) -> words.parse -> translate -> the configuration, printed -> memory check -> train, or evaluate
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Any

from tpu_tune import config as configuration
from tpu_tune.cli import train
from tpu_tune.cli.common import Commands
from tpu_tune.errors import UserError

_ABOUT = """
Everything else on the line is the script's: flags of Hugging Face's TrainingArguments, of qlora.py, and of the
PygmalionAI training code, with dashes or underscores; `accelerate launch ./train.py` before them is taken off.
Unset flags of TrainingArguments have Hugging Face's defaults, also where qlora.py has others (a line names these); flags
that only qlora.py or the training code has, have theirs. What changes no number (recomputing layers, attention kernels)
is tpu-tune's choice unless the flag is given. --config.KEY=VALUE has the last word.
"""


_HONOURED = "WANDB_PROJECT WANDB_NAME WANDB_MODE HF_DATASETS_CACHE HF_HOME HF_HUB_CACHE TPU_TUNE_CACHE".split()


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "hf",
        run,
        "run a Hugging Face training script's flags as they are",
        "tpu-tune hf accelerate launch ./train.py --model_name_or_path DIR --train_file chats.jsonl "
        "--output_dir out --bf16 true --use_lora",
    )
    parser.description += _ABOUT
    parser.allow_abbrev = False
    parser.usage = "tpu-tune hf [options] [LAUNCHER SCRIPT] --FLAG VALUE ..."
    parser.add_argument("--script", metavar="FILE.sh", help="take the flags from a bash script; nothing of it is run")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the configuration and stop")
    parser.add_argument(
        "--write-config", "--write_config", metavar="FILE.py", help="write it to a file for tpu-tune train --config"
    )
    parser.add_argument(
        "--flags", action="store_true", dest="list_flags", help="list every flag and what becomes of it"
    )
    parser.add_argument("--no-check", action="store_true", help="start without asking first whether the job fits")
    # `rest` receives what argparse does not know; the --config.KEY=VALUE are laid over what the flags say.
    parser.set_defaults(rest=[], config=None)


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.cli.hf import listing, words
    from tpu_tune.cli.hf.rows import fit_rows
    from tpu_tune.cli.hf.script import read_script
    from tpu_tune.cli.hf.translate import translate

    if options.list_flags:
        print("\n".join(listing.all_flags()))
        return 0
    rest, exported, others = list(options.rest), {}, []
    if options.script:
        found, exported, others = read_script(options.script)
        rest = found + rest  # what stands on our own line comes last, and wins
    if not rest:
        raise UserError("no flags; give those of a script, or --script FILE.sh (tpu-tune hf --help)")
    given = words.parse(rest)
    if given.get("use_cpu"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # before jax looks for devices
    if not options.dry_run:
        from tpu_tune.training import distributed

        with distributed.leaving_alone():
            distributed.join()
    asked = translate(given, _platform, {**os.environ, **exported})
    os.environ.update({name: exported[name] for name in _HONOURED if name in exported} | asked.environ)
    for key, value in options.overrides:
        configuration.assign(asked.config, key, value)
    configuration.check(asked.config)
    overridden = {key for key, _ in options.overrides}
    if asked.derived_length and "data.max_length" not in overridden:
        asked.notes += fit_rows(asked.config)
    if options.write_config:
        listing.write_config(asked.config, options.write_config)
    if options.dry_run and options.json:
        print(json.dumps(listing.as_json(asked), indent=2))
        return 0
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        if options.dry_run or _is_main():
            print("\n".join(listing.lines(asked, given, others)), flush=True)
    if options.dry_run:
        return 0
    return _go(asked, options)


def _go(asked: Any, options: argparse.Namespace) -> int:
    if asked.train:
        if not options.no_check:
            train._check_memory(asked.config, asked.max_memory)
        return train.start(asked.config, options.json)
    from tpu_tune.training import distributed
    from tpu_tune.training.evaluate_only import evaluate_only

    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        with distributed.leaving_alone():
            metrics = evaluate_only(asked.config)
    if options.json:
        print(json.dumps(metrics))
    return 0


def _platform() -> str:
    import jax

    return jax.default_backend()


def _is_main() -> bool:
    import jax

    return jax.process_index() == 0
