"""Flags about the training data: where it is, its format, the length of rows, and the rows held out for evaluation."""

from __future__ import annotations

import copy
import os

from ml_collections import ConfigDict

from tpu_tune.cli.hf.command_line import ScriptFlags
from tpu_tune.cli.hf.flags import QLORA, QLORA_EVAL_ROWS, QLORA_LENGTHS
from tpu_tune.errors import UserError

FORMATS = {  # qlora.py's --dataset_format -> (data.format, data.columns)
    "input-output": ("input-output", {}),
    "alpaca": ("alpaca", {}),
    "alpaca-clean": ("alpaca", {}),
    "self-instruct": ("prompt-completion", {}),
    "hh-rlhf": ("text", {"chosen": "text"}),
    "oasst1": ("text", {}),
}
DATASETS = {  # qlora.py's names of datasets -> (hub id, --dataset_format)
    "alpaca": ("tatsu-lab/alpaca", "alpaca"),
    "alpaca-clean": ("yahma/alpaca-cleaned", "alpaca"),
    "hh-rlhf": ("Anthropic/hh-rlhf", "hh-rlhf"),
    "longform": ("akoksal/LongForm", "input-output"),
    "oasst1": ("timdettmers/openassistant-guanaco", "oasst1"),
}


def set_data(flags: ScriptFlags, config: ConfigDict, evaluates: bool) -> None:
    """Set where the rows are, their format, and which of them are held out for evaluation."""
    data, sources = config.data, [name for name in ("train_file", "dataset") if flags.get(name)]
    if len(sources) > 1:
        raise UserError("--train_file and --dataset exclude each other")
    format = flags.get("dataset_format")
    if sources:
        data.train = flags.get(sources[0])
        if data.train in DATASETS and not os.path.exists(data.train):
            data.train, default_format = DATASETS[data.train]
            format = format or default_format
    if format is not None:
        if format not in FORMATS:
            raise UserError(f"{flags.spelled('dataset_format')} is '{format}'; it must be one of {', '.join(FORMATS)}")
        data.format, columns = FORMATS[format]
        data.columns = dict(columns)
    data.train_on_source = _train_on_source(flags)
    workers = flags.get("preprocessing_num_workers", flags.get("dataloader_num_workers", 0))
    data.num_workers = max(0, workers)
    tokens = flags.get("add_special_tokens", [])
    if tokens:
        config.model.add_special_tokens = tokens
        if config.method == "lora":
            flags.note(
                f"{flags.spelled('add_special_tokens')}: with LoRA, embeddings of new tokens are not trained unless "
                "embed_tokens is a target; --config.model.train_added_tokens=True trains these embeddings alone"
            )
    if not evaluates:
        data.eval_ratio = 0.0  # every row is trained on
        return
    if flags.get("eval_file"):
        data.eval = flags.get("eval_file")
        return
    _set_eval_ratio(flags, config)


def _train_on_source(flags: ScriptFlags) -> bool:
    """Whether the loss is on prompts too: qlora.py's flag, and TRL's two, which say the opposite.

    TRL's own default differs by the rows: all of a chat, and the completion only of a prompt with one. Ours is the
    answers only; rows that are text alone are trained on in full.
    """
    said = {
        name: not flags.get(name) for name in ("assistant_only_loss", "completion_only_loss") if name in flags.values
    }
    if "train_on_source" in flags.values:
        said["train_on_source"] = flags.get("train_on_source")
    if len(set(said.values())) > 1:
        names = " and ".join(f"{flags.spelled(name)} {str(flags.get(name)).lower()}" for name in said)
        raise UserError(f"{names} contradict each other: the loss is on the prompts or not; leave one of them out")
    on_source = any(said.values())
    for name in said.keys() - {"train_on_source"}:
        what = "prompts too" if on_source else "answers only (rows that are text alone have none, and are refused)"
        flags.note(f"{flags.spelled(name)} {str(flags.get(name)).lower()}: the loss is on {what}")
    return on_source


def check_answers(flags: ScriptFlags, config: ConfigDict) -> None:
    """Hold TRL's flags for a loss on answers only against rows that have none; of a hub dataset this is not known.

    Raises:
      UserError: a row is text alone.
    """
    from tpu_tune.data.formats import RowError, format_of
    from tpu_tune.data.sources import is_hub, read_rows, resolve

    names = [name for name in ("assistant_only_loss", "completion_only_loss") if flags.get(name)]
    path = config.data.train
    if not names or not isinstance(path, str) or not os.path.exists(os.path.expanduser(path)):
        return
    source = resolve(path)[0][0]
    rows = [] if is_hub(source) else read_rows(source)[0]
    try:
        is_text = [format_of(row, config.data.format, config.data.columns) == "text" for row in rows]
    except RowError:
        return  # training reports it with more context
    if any(is_text):
        which = f"the rows of {path} are" if all(is_text) else f"row {is_text.index(True) + 1} of {path} is"
        raise UserError(f"{flags.spelled(names[0])}: {which} text without answers; leave the flag out")


def _set_eval_ratio(flags: ScriptFlags, config: ConfigDict) -> None:
    """Set how many of the rows to hold out if no file for evaluation is given."""
    percent, count = flags.get("validation_split_percentage"), flags.get("eval_dataset_size")
    if percent is not None:
        config.data.eval_ratio = percent / 100
    elif count is not None and count < 1:
        config.data.eval_ratio = count
    elif count is not None:
        config.data.eval_dataset_size = int(count)
    elif flags.get("dataset") and set(flags.values) & QLORA and not os.path.exists(config.data.train):
        config.data.eval_dataset_size = QLORA_EVAL_ROWS
    elif flags.get("dataset"):
        config.data.eval_ratio = 0.1  # of a file of one's own
    if not 0 < config.data.eval_ratio < 1:
        raise UserError(f"the share of rows for evaluation is {config.data.eval_ratio:g}; it must be between 0 and 1")
    if config.data.eval_dataset_size:
        flags.note(
            f"evaluation: on {config.data.eval_dataset_size:,} of the rows, which are not trained on; evaluation rows "
            "that the data brings are not used (--eval_file names some)"
        )
        return
    flags.note(
        "evaluation: on the evaluation file of the data's directory if it has one, else on "
        f"{config.data.eval_ratio:.3g} of the rows, which are not trained on"
    )


def set_lengths(flags: ScriptFlags, config: ConfigDict) -> bool:
    """Set how long a row may be; return whether data.max_length was derived, not given."""
    data = config.data
    limits = [flags.get("source_max_len"), flags.get("target_max_len")]
    for name, value in zip(
        ("source_max_len", "target_max_len", "max_length"), [*limits, flags.get("max_length")], strict=True
    ):
        if value is not None and value < 1:
            raise UserError(f"{flags.spelled(name)} is {value}; there must be at least one")
    if any(limits) or set(flags.values) & QLORA:
        limits = [value or default for value, default in zip(limits, QLORA_LENGTHS, strict=True)]
        data.source_max_len, data.target_max_len = limits
        data.max_length = limits[1] + (
            1 if _is_whole_text(flags) else limits[0]
        )  # of texts the source is the BOS token
        missing = [
            f"{name} {value}"
            for name, value in zip(("source_max_len", "target_max_len"), limits, strict=True)
            if name not in flags.values
        ]
        if missing:
            flags.note(f"not given, so qlora.py's defaults: {', '.join(missing)}")
    if flags.get("max_length"):
        data.max_length = flags.get("max_length")
    return not flags.get("max_length")


def _is_whole_text(flags: ScriptFlags) -> bool:
    """Whether qlora.py takes the rows for texts, all of which is the target."""
    format = flags.get("dataset_format") or DATASETS.get(flags.get("dataset"), ("", ""))[1]
    return FORMATS.get(format, ("", {}))[0] == "text"


def fit_max_length(config: ConfigDict) -> list[str]:
    """Fit a derived `data.max_length` to tokenized files and to the model; return notes for the user.

    Rows of .arrow files keep their length, and only models with learned position embeddings limit it. A file or a model
    that cannot be read is no error here: training reports it with more context.
    """
    from tpu_tune.models import architecture
    from tpu_tune.planning.model_config import model_config

    notes, data = [], config.data
    tokenized = [path for path in (data.train, data.eval) if isinstance(path, str) and path.lower().endswith(".arrow")]
    longest = [_longest(path) for path in tokenized]
    if longest and None not in longest:
        data.max_length = -(-max(longest) // 64) * 64
        notes.append(f"the longest row of {' and '.join(tokenized)} has {max(longest):,} tokens, so no row is cut")
    probe = copy.deepcopy(config)
    probe.data.max_length = 1
    try:
        arch = architecture(model_config(probe))
    except UserError:
        return notes
    if arch.names.positions and data.max_length > arch.max_positions:
        data.max_length = arch.max_positions
        notes.append(f"rows are at most {arch.max_positions:,} tokens, because the model has no more positions")
    return notes


def _longest(path: str) -> int | None:
    """Return the number of tokens of the longest row of an Arrow IPC file; None if it cannot be read."""
    import pyarrow
    import pyarrow.compute

    try:
        with pyarrow.memory_map(os.path.expanduser(path)) as file, pyarrow.ipc.open_file(file) as reader:
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            lengths = (pyarrow.compute.list_value_length(batch.column("input_ids")) for batch in batches)
            return max((pyarrow.compute.max(each).as_py() or 0 for each in lengths), default=0) or None
    except (OSError, KeyError, pyarrow.ArrowException):
        return None
