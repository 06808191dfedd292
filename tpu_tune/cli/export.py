"""`tpu-tune export`: write what a run has made for other programs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tpu_tune.cli.common import DTYPES, Commands, add_step
from tpu_tune.errors import UserError

# As in checkpoints/gguf_mixtures.py, whose import would slow --help down.
GGUF_TYPES = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0")


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "export",
        run,
        "write a run's adapter, its merged model, or its base, of a stopped run too",
        "tpu-tune export output/quickstart --merge --output merged\n"
        "  tpu-tune export output/quickstart --step 40 --output adapter-40\n"
        "  tpu-tune export output/quickstart --gguf --output model.gguf",
    )
    parser.add_argument("run_directory", metavar="RUN", help="run directory, local or gs://")
    parser.add_argument("--output", required=True, help="directory to write; with --gguf the file")
    add_step(parser)
    add_forms(parser, base=True)


def add_forms(parser: argparse.ArgumentParser, base: bool = False) -> None:
    """Add the options that say in which form a run's result leaves it; with `base`, `--base` too."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--merge", action="store_true", help="a Hugging Face model with the adapter merged in, not the adapter"
    )
    what.add_argument(
        "--gguf", action="store_true", help="one GGUF file with the adapter merged in, for llama.cpp and its kin"
    )
    merge_base = "weights to merge into (default original)"
    if base:
        what.add_argument("--base", action="store_true", help="the base model that PEFT should load below the adapter")
        merge_base += " or to write as the base (default dequantized, exact to training)"
    parser.add_argument("--merge-base", choices=("original", "dequantized"), help=merge_base)
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors (default: the original's; float32 from a GGUF)")
    parser.add_argument(
        "--gguf-type",
        choices=GGUF_TYPES,
        help="number format of a GGUF file's matrices (default f16); q4_k_m and below as llama-quantize mixes them",
    )


def check_forms(options: argparse.Namespace) -> None:
    """Refuse options that mean nothing to the form that was chosen.

    Raises:
      UserError: there is one.
    """
    has_base = "base" in options
    if not (options.merge or options.gguf or (has_base and options.base)) and (options.merge_base or options.dtype):
        forms = "--merge, --gguf or --base" if has_base else "--merge or --gguf"
        raise UserError(f"--merge-base and --dtype belong to {forms}; the adapter alone is copied as it is")
    if options.gguf and options.dtype:
        raise UserError(
            f"--dtype belongs to --merge{' or --base' * has_base}; a GGUF file's numbers are chosen with --gguf-type"
        )
    if options.gguf_type and not options.gguf:
        raise UserError("--gguf-type belongs to --gguf")


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.checkpoints import ollama
    from tpu_tune.checkpoints.params import open_architecture
    from tpu_tune.checkpoints.source import open_source
    from tpu_tune.inference import export

    figures: dict[str, Any] = {}
    check_forms(options)
    if options.base and options.step is not None:
        raise UserError("--step belongs to what was trained; the base is the same at every step")
    if options.gguf:
        kind = options.gguf_type or "f16"
        export.check_output(ollama.modelfile_of(options.output))
        figures = export.export_gguf(
            options.run_directory, options.output, options.merge_base or "original", kind, options.step
        )
        written = open_source(options.output)
        runs_there = open_architecture(written).encoder is None
        has_template = runs_there and ollama.write_modelfile(options.output, written)
        what = f"the merged model as GGUF, {kind.upper()}"
    elif options.base:
        export.export_base(
            options.run_directory, options.output, options.merge_base or "dequantized", options.dtype or ""
        )
        what = "the base that PEFT should load"
    elif options.merge:
        figures = export.export_merged(
            options.run_directory, options.output, options.merge_base or "original", options.dtype or "", options.step
        )
        what = f"the model merged into its {options.merge_base or 'original'} base"
    else:
        method = export.export_result(options.run_directory, options.output, options.step)
        what = "the PEFT adapter" if method == "lora" else "the model, which has no adapter: every weight was trained"
    if options.json:
        print(json.dumps({"output": options.output, **figures}))
        return 0
    print(f"{options.output}: {what}")
    if figures:
        print(
            f"against the model as it was trained: logits differ by at most {figures['max_logit_difference']:.4g} "
            f"({figures['relative_logit_difference']:.2%} of the largest), the first guess is the same in "
            f"{figures['same_first_guesses']:.1%} of places"
        )
    if options.gguf and runs_there:
        file = ollama.modelfile_of(options.output)
        print(f"{file}: for `ollama create NAME -f`{'' if has_template else ', which has to guess the template'}")
    return 0
