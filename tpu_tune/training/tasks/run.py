"""`run_task(model, settings)`: one task by its name, from the file to the figures."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from tpu_tune.errors import UserError
from tpu_tune.inference.model import Model
from tpu_tune.training.tasks import exact_match, mmlu, multiple_choice
from tpu_tune.training.tasks.intervals import Outcome
from tpu_tune.training.tasks.judgements import score_judgements
from tpu_tune.training.tasks.perplexity import score_perplexity
from tpu_tune.training.tasks.questions import read_questions
from tpu_tune.training.tasks.task_rows import LocatedRow, read_task_rows

TASKS = ("perplexity", "classification", "multiple-choice", "mmlu", "exact-match")


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What is measured on what.

    Attributes:
      task: one of `TASKS`.
      data: file, directory or hub id; where it is empty, perplexity takes the config's.
      shots: solved examples before each question.
      shots_data: where these come from; empty: the first rows of `data`, which are then not scored.
      by: likelihood | letter; how multiple choice is scored.
      split, subset, limit: see `read_task_rows`.
      max_new_tokens, chat: for exact match, see `score_answers`.
      as_taught: for exact match, ask as the rows of the model's training did.
      source_max_len, batch_size: for MMLU, see `score_mmlu`.
      seed: the seed that choices are shuffled by.
    """

    task: str
    data: str = ""
    shots: int = 0
    shots_data: str = ""
    by: str = "likelihood"
    split: str = ""
    subset: str = ""
    limit: int = 0
    max_new_tokens: int = 256
    chat: bool = False
    as_taught: bool = False
    source_max_len: int = 2048
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"task is '{self.task}'; it must be one of {', '.join(TASKS)}")
        if self.shots < 0 or self.limit < 0:
            raise UserError(f"shots={self.shots} and limit={self.limit} must be at least 0")


def read_rows_for(settings: TaskSettings) -> tuple[list[LocatedRow], list[LocatedRow] | None]:
    """Return a task's rows, and the rows that its solved examples come from (None: the same)."""
    path = settings.data
    if settings.task == "mmlu":
        path = mmlu.file_of(path, settings.shots, settings.split)
    split = settings.split if path == settings.data else ""
    rows = read_task_rows(path, split, settings.subset, settings.limit)
    if not settings.shots or not settings.shots_data:
        return rows, None
    return rows, read_task_rows(settings.shots_data, "", settings.subset)


def run_task(model: Model, settings: TaskSettings, config: ConfigDict | None = None) -> Outcome:
    """Measure a model.

    Args:
      model: a model from `tpu_tune.load`.
      settings: what to measure on what.
      config: how perplexity's data is read; the other tasks need none.

    Raises:
      UserError: data that is not what the task needs; says which row.
    """
    if settings.task in ("perplexity", "classification"):
        if config is None:
            raise UserError(f"{settings.task} needs a configuration, which says how its data is read")
        score = score_judgements if model.architecture.num_labels else score_perplexity
        if settings.task == "classification":
            score = score_judgements
        return score(model, config, settings.limit)
    if model.architecture.num_labels:
        raise UserError(
            f"task {settings.task} asks a language model; this one has a head for labels: use classification"
        )
    rows, examples = read_rows_for(settings)
    if settings.task == "mmlu":
        prompts = mmlu.prompts_of(rows, settings.shots, examples)
        split = "test" if settings.split == "test" else "eval"
        return mmlu.score_mmlu(model, prompts, split, settings.source_max_len, settings.batch_size)
    if settings.task == "exact-match":
        asked = exact_match.read_asked(rows)
        solved = None if examples is None else exact_match.read_asked(examples)
        chat = None if settings.as_taught else settings.chat
        return exact_match.score_answers(model, asked, settings.shots, solved, settings.max_new_tokens, chat)
    questions = read_questions(rows)
    solved = None if examples is None else read_questions(examples)
    if settings.by == "letter":
        return multiple_choice.by_letter(model, questions, settings.shots, solved, settings.seed)
    return multiple_choice.by_likelihood(model, questions, settings.shots, solved)
