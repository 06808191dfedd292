"""`tpu-tune plan`: find out whether a job fits a device."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands, add_config, read_config, say
from tpu_tune.errors import UserError

if TYPE_CHECKING:
    from tpu_tune.planning import Device


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "plan",
        run,
        "compute whether a job fits a device, its memory and its time; needs neither the weights nor the device",
        "tpu-tune plan --config configs/qlora.py --config.model.path=llama-7b --device v5e-1",
    )
    add_config(parser)
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        nargs="+",
        metavar="NAME",
        help="a TPU slice (v2-8, v3-8, v4-8, v5e-1, v5e-4, v5e-8, v5e-64, v6e-1, v6e-8, v5p-8, tpu7x-8) or a GPU (t4, "
        "l4, rtx2080ti, rtx3060, rtx3070, rtx3080, rtx3090, rtx4060, rtx4070, rtx4080, rtx4090, rtx5070, rtx5090, "
        "rtxpro6000, gb10, a100-40g, a100-80g, h100, h200, b200, rtx6000ada-48g); two GPUs: t4 x2; several names make "
        "one table",
    )
    parser.add_argument(
        "--memory",
        action="append",
        default=[],
        nargs="+",
        metavar=("GB", "GENERATION"),
        help="a GPU of so much memory instead of a name, and of what generation: ampere (as default), ada, hopper, "
        "blackwell, turing; --memory 12, --memory 16 ada, --memory 24 ampere x2",
    )
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="find what trains most tokens a second of what fits, or else what would fit, and recommend one",
    )
    parser.add_argument(
        "--rows",
        type=numbers.whole(),
        metavar="N",
        help="number of training rows, for the run's length (with data.packing, of packed rows)",
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="estimate the memory from array sizes alone, in seconds instead of minutes",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="estimate the time of a TPU's own kernels from their instructions, which takes three times as long",
    )
    parser.add_argument(
        "--max-compiles",
        type=numbers.whole(1),
        default=8,
        metavar="N",
        help="most compilations that --suggest may make for a device (default 8)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from tpu_tune import planning

    config, devices = read_config(options), _devices(options)
    if options.kernels and (options.suggest or options.no_compile):
        other = "--suggest" if options.suggest else "--no-compile"
        raise UserError(f"--kernels is for a plan by the compiler, and does not go with {other}; leave one of them out")
    if options.no_compile:
        planning.count_here(max(device.count for device in devices))
    if options.suggest:
        return _suggest(config, devices, options)
    plans = []
    for device in devices:
        try:
            compile = not options.no_compile
            plans.append(planning.plan(config, device, options.rows, compile, say=say, kernels=options.kernels))
        except UserError as error:
            if len(devices) == 1:
                raise
            plans.append({"device": device.name, "error": str(error)})
    if options.json:
        print(json.dumps(plans if len(plans) > 1 else plans[0], indent=2))
    else:
        print(planning.comparison(plans) if len(plans) > 1 else planning.table(plans[0]))
    if all("error" in figures for figures in plans):
        raise UserError("there is no plan for any of these devices")
    if not options.json and not any(figures.get("fits") for figures in plans):
        say("what would fit: the same command with --suggest")
    return 0


def _suggest(config: Any, devices: list[Device], options: argparse.Namespace) -> int:
    """Print what fits each device, and of several devices what is recommended on which."""
    from tpu_tune import planning

    compile, found = not options.no_compile, []
    for device in devices:
        how = planning.what_a_plan_does(device, compile)
        most = f"with at most {options.max_compiles} compilations; each is: {how}" if compile else f"{how} for each try"
        say(f"looking for what fits {device.name}, {most}")
        found.append(planning.suggest(config, device, options.rows, compile, options.max_compiles, say))
    if options.json:
        print(json.dumps(found if len(found) > 1 else found[0], indent=2))
        return 0
    print("\n\n".join(planning.advice(suggestion) for suggestion in found))
    if len(found) > 1:
        print("\n" + planning.best_of(found))
    return 0


def _devices(options: argparse.Namespace) -> list[Device]:
    """Return the devices that --device and --memory name, in this order.

    Raises:
      UserError: neither is given, or one of them is no device.
    """
    from tpu_tune import planning

    names = planning.split_names([word for words in options.device for word in words])
    names += [name for words in options.memory for name in _by_memory(words)]
    if not names:
        raise UserError("plan for what? give --device NAME, such as --device v3-8 rtx3060, or --memory 12 for a GPU")
    return [planning.find_device(name) for name in dict.fromkeys(names)]


def _by_memory(words: list[str]) -> list[str]:
    """Return the names of the cards that --memory describes: `12`, `12 ada`, `8 12 24 ampere x2`."""
    from tpu_tune import planning

    cards: list[dict[str, Any]] = []
    for word in " ".join(words).lower().replace(",", " ").split():
        number = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(?:gb?|gib)?", word)
        if number:
            cards.append({"gigabytes": float(number[1]), "generation": "ampere", "several": ""})
        elif not cards:
            raise UserError(f"--memory is '{word}'; give a card's memory in GB, e.g. --memory 12 ada")
        elif re.fullmatch(r"[x*]\d*", word):
            cards[-1]["several"] += f" {word}"
        else:
            cards[-1]["generation"] = word
    return [planning.by_memory(card["gigabytes"], card["generation"]) + card["several"] for card in cards]
