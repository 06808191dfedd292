"""What a configuration leaves open about its head, found before anything is loaded: the labels and their kind.

They are, in this order: what the configuration says, what the run in `output_dir` has recorded, the labels of a model
that is a classifier already, and those in the rows of `data.train`. What is found goes into the configuration, and with
it into the run's config.json, so that a run keeps its labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import peft
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.data import arrow
from tpu_tune.data.formats import rename
from tpu_tune.data.labels import Labels, find_labels
from tpu_tune.data.messages import RowError
from tpu_tune.data.mixture import resolve_all
from tpu_tune.data.sources import read_rows
from tpu_tune.errors import UserError
from tpu_tune.models import SCORE, is_classifier, label_names


def resolve_head(config: ConfigDict) -> ConfigDict:
    """Return a checked configuration with its labels, their number and their kind filled in.

    Raises:
      UserError: rows without labels, of several kinds, or with other labels than the configuration names.
    """
    head = config.head
    if head.name != "classification":
        return config
    recorded = _recorded(config)
    if recorded:
        for name in ("num_labels", "labels", "problem_type"):
            if config.head[name] in (0, [], (), "auto"):
                config.head[name] = recorded[name]
    if head.labels and head.problem_type != "auto":
        head.num_labels = len(head.labels)
        return config
    try:
        found = find_labels(_rows(config.data), head.problem_type)
    except UserError as error:
        raise UserError(f"{', '.join(configuration.source_paths(config.data.train))}: {error}") from None
    head.problem_type = found.problem_type
    names = list(head.labels) or _model_labels(config, found) or list(found.names)
    if not head.labels and head.num_labels > len(names) and names[0] == "LABEL_0":
        names = label_names({"num_labels": head.num_labels})
    if head.num_labels not in (0, len(names)):
        raise UserError(
            f"head.num_labels is {head.num_labels}, and the rows have {len(names)} labels "
            f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}); name them all in head.labels"
        )
    head.labels, head.num_labels = names, len(names)
    return configuration.check(config)


def in_words(config: ConfigDict, source: WeightSource) -> str:
    """Say what head is trained, and whether it is new."""
    names = label_names(source.config)
    kind = config.head.problem_type.replace("_", " ")
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    what = "reward" if config.head.name == "reward" else f"{kind}, {len(names)} labels ({shown})"
    is_new = source.new_head
    if config.model.adapter:
        is_new = is_new and SCORE not in peft.read_spec(config.model.adapter).modules_to_save
    return f"head: {what}" + ("; it is new, for the model's files have none like it" if is_new else "")


def _recorded(config: ConfigDict) -> Mapping[str, Any] | None:
    """Return the head of the run in `output_dir`, where there is a run with a head of this name."""
    run = RunDirectory(config.output_dir)
    recorded = run.config().head if run.exists() else None
    return recorded if recorded is not None and recorded.name == config.head.name else None


def _model_labels(config: ConfigDict, found: Labels) -> list[str]:
    """Return the names of a classifier's labels where they fit what the rows have; else none."""
    source = open_source(config.model.path).config
    if not is_classifier(source):
        return []
    names = label_names(source)
    by_number = found.names[:1] == ("LABEL_0",) and len(found.names) <= len(names)
    if config.head.num_labels in (0, len(names)) and (by_number or {*found.names} <= {*names}):
        return names
    return []


def _rows(data: ConfigDict) -> Iterator[Mapping[str, Any]]:
    for source in resolve_all(data.train)[0]:
        if arrow.is_tokenized(source):
            raise UserError(f"a classification reads texts or chats with a label, not tokenized rows ({source})")
        for row in read_rows(source, skip_bad_rows=data.skip_bad_rows)[0]:
            with contextlib.suppress(RowError):  # tokenizing says which row, and why
                yield rename(row, data.columns)
