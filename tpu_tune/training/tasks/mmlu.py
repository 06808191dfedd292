"""MMLU exactly as QLoRA scores it (artidoro/qlora, qlora.py, MMLUEvalCallback; Dettmers et al. 2023, arXiv:2305.14314).

Prompt and answer are tokenized apart: BOS + prompt, cut on the right to `source_max_len`, and answer + EOS. At the
place before the answer the largest of four logits counts, those of the first tokens of "A", "B", "C", "D" by
themselves. The accuracy is the mean over subjects of each subject's. The loss is the mean over batches of each batch's
mean over both answer tokens.

The files are QLoRA's own (`input`, `output`, `subject`; its five_shot_mmlu_val.json and so on), or MMLU's questions
(`question`, `choices`, `answer`, `subject`), from which the same prompts are made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tpu_tune.data.formats import RowError
from tpu_tune.errors import UserError
from tpu_tune.inference.model import Model
from tpu_tune.inference.scoring import IGNORED, Row, score
from tpu_tune.training.tasks.intervals import Measure, Outcome
from tpu_tune.training.tasks.questions import LETTERS, letter_block, read_questions, split_shots
from tpu_tune.training.tasks.task_rows import LocatedRow

log = logging.getLogger(__name__)
ANSWERS = "ABCD"


def file_of(path: str, shots: int, split: str) -> str:
    """Return the file of a directory with QLoRA's names (five_shot_mmlu_val.json), or `path` itself."""
    name = f"{'five' if shots else 'zero'}_shot_mmlu_{split or 'val'}.json"
    file = os.path.join(path, name)
    return file if os.path.isfile(file) else path


def prompts_of(
    rows: Sequence[LocatedRow], shots: int = 0, examples: Sequence[LocatedRow] | None = None
) -> list[dict[str, str]]:
    """Return `input`, `output`, `subject` of each row; QLoRA's rows as they are, questions with QLoRA's prompts.

    Args:
      rows: all in one of the two forms.
      shots: solved examples of the same subject before each question; QLoRA's rows have theirs already.
      examples: rows to take them from; None takes each subject's first ones, which are then not scored.

    Raises:
      UserError: a row without an answer among A to D, or of no known form.
    """
    if not rows:
        raise UserError("there is no question to answer")
    if "input" in rows[0][1] or "output" in rows[0][1]:
        return [_checked(where, row) for where, row in rows]
    questions = read_questions(rows)
    for (where, _), question in zip(rows, questions, strict=True):
        if len(question.choices) != len(ANSWERS):
            raise UserError(f"{where}: {len(question.choices)} choices, and MMLU's questions have 4")
    kept, pools = split_shots(questions, shots, None if examples is None else read_questions(examples), by_subject=True)
    made = []
    for question in kept:
        # The second blank before the subject is in the files of QLoRA, and of Hendrycks et al. before it.
        head = "The following are multiple choice questions (with answers) about "
        head += f" {question.subject.replace('_', ' ')}.\n\n"
        solved = "".join(
            f"{letter_block(example)} {LETTERS[example.answer]}\n\n" for example in pools.get(question.subject, [])
        )
        text = head + solved + letter_block(question)
        made.append({"subject": question.subject, "input": text, "output": ANSWERS[question.answer]})
    return made


def _checked(where: str, row: dict[str, Any]) -> dict[str, str]:
    try:
        for key in ("input", "output"):
            if not isinstance(row.get(key), str):
                raise RowError(f"no '{key}', which a row of MMLU needs; its keys: {', '.join(map(str, row))}")
        if row["output"] not in ANSWERS or len(row["output"]) != 1:
            raise RowError(f"the answer is {row['output'][:40]!r}; it must be one of {', '.join(ANSWERS)}")
    except RowError as error:
        raise UserError(f"{where}: {error}") from error
    return {**row, "subject": str(row.get("subject") or "")}


def score_mmlu(
    model: Model,
    prompts: Sequence[dict[str, str]],
    split: str = "eval",
    source_max_len: int = 2048,
    batch_size: int = 8,
) -> Outcome:
    """Score prompts as `prompts_of` gives them.

    Args:
      model: decoder-only.
      prompts: `input`, `output`, `subject`.
      split: eval | test, QLoRA's `mmlu_split`; it stands in the figures' names.
      source_max_len: tokens that are kept of a prompt, from its start (QLoRA's `mmlu_source_max_len`).
      batch_size: rows whose losses are averaged together before the mean over batches
        (`per_device_eval_batch_size`, 8 by default there); it changes the loss only where the last batch is smaller.

    Returns:
      QLoRA's figures: `mmlu_loss`, `mmlu_{split}_accuracy`, `mmlu_{split}_accuracy_{subject}`, and `truncated`.

    Raises:
      UserError: the answers are not a token each with EOS behind it, or the model is an encoder-decoder.
    """
    if model.architecture.encoder:
        raise UserError("MMLU is scored as QLoRA does, on decoder-only models; use --task multiple-choice")
    tokenizer = model.tokenizer
    letters = [_ids(tokenizer, letter)[0] for letter in ANSWERS]
    answer_ids = {letter: _ids(tokenizer, letter + (tokenizer.eos_token or "")) for letter in ANSWERS}
    size = len(answer_ids["A"])
    end = [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
    if len(set(letters)) != len(ANSWERS) or any(
        [first, *end] != answer_ids[name] for first, name in zip(letters, ANSWERS, strict=True)
    ):
        raise UserError("the tokenizer does not write A, B, C and D as one token each with the end of text behind it")
    rows, truncated = [], 0
    for prompt in prompts:
        source = _ids(tokenizer, (tokenizer.bos_token or "") + prompt["input"])
        truncated += len(source) > source_max_len
        source, answer = source[:source_max_len], answer_ids[prompt["output"]]
        ids = [*source, *answer]
        rows.append(Row(ids[:-1], [IGNORED] * (len(source) - 1) + answer))
    if truncated:
        log.warning(
            "%d prompts are longer than %d tokens and lose their end, the question, as in QLoRA",
            truncated,
            source_max_len,
        )
    scores = score(model, rows, letters)
    guesses = np.argmax(scores.first_logits, axis=1)
    right = [ANSWERS[guess] == prompt["output"] for guess, prompt in zip(guesses, prompts, strict=True)]
    losses = -scores.log_likelihood / size
    batches = [losses[start : start + batch_size].mean() for start in range(0, len(losses), batch_size)]
    subjects = list(dict.fromkeys(prompt["subject"] for prompt in prompts))
    groups = [subjects.index(prompt["subject"]) for prompt in prompts]
    name = f"mmlu_{split}_accuracy"
    measure = Measure.share(name, right, groups)
    figures: dict[str, Any] = {name: measure.value, "mmlu_loss": float(np.mean(batches))}
    for number, subject in enumerate(subjects):
        if subject:
            figures[f"{name}_{subject}"] = float(
                np.mean([r for r, g in zip(right, groups, strict=True) if g == number])
            )
    predictions = [
        {**prompt, "prediction": ANSWERS[guess], "correct": is_right}
        for prompt, guess, is_right in zip(prompts, guesses, right, strict=True)
    ]
    return Outcome({**figures, "questions": len(prompts), "truncated": truncated}, (measure,), predictions)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
