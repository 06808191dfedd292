"""Multiple choice: by the likelihood of each choice's words, or by the letter in front of it.

By likelihood, a choice is scored as the continuation of its question: `acc` takes the likeliest, `acc_norm` the
likeliest by its length in characters and `acc_bytes` in bytes, as lm-evaluation-harness defines all three. By letter,
the model sees the choices and is asked for A, B, C...: the largest logit among them counts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from tpu_tune.checkpoints.tokenizers import encode_text
from tpu_tune.errors import UserError
from tpu_tune.inference.model import Model
from tpu_tune.inference.scoring import choice_logits, score_continuations
from tpu_tune.training.tasks.intervals import Measure, Outcome
from tpu_tune.training.tasks.questions import LETTERS, Question, letter_block, split_shots, with_shots


def by_likelihood(
    model: Model, questions: Sequence[Question], shots: int = 0, examples: Sequence[Question] | None = None
) -> Outcome:
    """Answer by the likelihood of each choice; see `split_shots` for shots and examples.

    Returns:
      Figures `acc`, `acc_norm`, `acc_bytes`, `questions`; predictions with `prediction` (the choice that `acc` takes),
      `correct` and `log_likelihoods`.
    """
    questions, pools = split_shots(questions, shots, examples)
    solved = [(example.stem, example.choices[example.answer]) for example in pools.get("", [])]
    pairs = [
        (with_shots(question.primer, solved, question.stem), f" {choice}")
        for question in questions
        for choice in question.choices
    ]
    log_likelihoods = score_continuations(model, pairs).log_likelihood
    ends = np.cumsum([len(question.choices) for question in questions])
    scores = np.split(log_likelihoods, ends[:-1])
    right = {"acc": [], "acc_norm": [], "acc_bytes": []}
    predictions = []
    for question, scored in zip(questions, scores, strict=True):
        lengths = np.array([len(choice) for choice in question.choices], float)
        sizes = np.array([len(choice.encode("utf-8")) for choice in question.choices], float)
        guess = int(np.argmax(scored))
        for name, picked in (
            ("acc", guess),
            ("acc_norm", np.argmax(scored / lengths)),
            ("acc_bytes", np.argmax(scored / sizes)),
        ):
            right[name].append(int(picked) == question.answer)
        predictions.append(_prediction(question, guess, {"log_likelihoods": [round(float(x), 6) for x in scored]}))
    return _outcome({name: Measure.share(name, values) for name, values in right.items()}, predictions)


def by_letter(
    model: Model,
    questions: Sequence[Question],
    shots: int = 0,
    examples: Sequence[Question] | None = None,
    seed: int = 0,
) -> Outcome:
    """Answer by the logits of the letters at the last position.

    Where the right choice always stands at one place in the file (TruthfulQA's is the first), the choices are shuffled,
    seeded: a model that likes A would know everything.

    Returns:
      Figures `acc`, `questions`, `shuffled`; predictions with `prediction`, `letter` and `correct`.

    Raises:
      UserError: more choices than letters, or letters that are more than a token each.
    """
    questions = list(questions)
    shuffled = len(questions) > 1 and len({question.answer for question in questions}) == 1
    if shuffled:
        draw = random.Random(seed)
        questions = [_shuffled(question, draw) for question in questions]
        examples = None if examples is None else [_shuffled(example, draw) for example in examples]
    questions, pools = split_shots(questions, shots, examples)
    solved = [(letter_block(example), LETTERS[example.answer]) for example in pools.get("", [])]
    most = max(len(question.choices) for question in questions)
    if most > len(LETTERS):
        raise UserError(f"a question has {most} choices, and there are {len(LETTERS)} letters")
    if model.architecture.encoder:
        raise UserError("letters are scored with decoder-only models; score by likelihood instead (--by likelihood)")
    tokens, before = letter_tokens(model.tokenizer, most)
    prompts = [
        [*model.encode_prompt(with_shots(_about(question), solved, letter_block(question))), *before]
        for question in questions
    ]
    logits = choice_logits(model, prompts, tokens)
    guesses = [int(np.argmax(row[: len(question.choices)])) for question, row in zip(questions, logits, strict=True)]
    right = [guess == question.answer for question, guess in zip(questions, guesses, strict=True)]
    predictions = [
        _prediction(question, guess, {"letter": LETTERS[guess]})
        for question, guess in zip(questions, guesses, strict=True)
    ]
    return _outcome({"acc": Measure.share("acc", right)}, predictions, shuffled=shuffled)


def letter_tokens(tokenizer: Any, count: int) -> tuple[list[int], list[int]]:
    """Return the tokens of the first letters behind "Answer:", and what comes before all of them (mostly nothing).

    The text goes on with " A"; a tokenizer that writes the blank as a token of its own has the same token first in all.

    Raises:
      UserError: the letters do not differ in one single token.
    """
    start = encode_text(tokenizer, "Answer:")
    whole = [encode_text(tokenizer, f"Answer: {letter}") for letter in LETTERS[:count]]
    after = [ids[len(start) :] for ids in whole]
    same_start = all(ids[: len(start)] == start for ids in whole)
    last_differs = len({tuple(ids[:-1]) for ids in after}) == 1 and len({ids[-1] for ids in after if ids}) == count
    if not (same_start and last_differs):
        raise UserError(
            f"the tokenizer does not write the letters {LETTERS[0]} to {LETTERS[count - 1]} as one token each; "
            "score by likelihood instead (--by likelihood)"
        )
    return [ids[-1] for ids in after], after[0][:-1]


def _about(question: Question) -> str:
    """MMLU's first line."""
    if not question.subject:
        return ""
    subject = question.subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}."


def _shuffled(question: Question, draw: random.Random) -> Question:
    order = list(range(len(question.choices)))
    draw.shuffle(order)
    return Question(
        question.question,
        question.stem,
        tuple(question.choices[index] for index in order),
        order.index(question.answer),
        question.subject,
        question.primer,
        question.row,
    )


def _prediction(question: Question, guess: int, more: dict[str, Any]) -> dict[str, Any]:
    return {**question.row, "prediction": question.choices[guess], "correct": guess == question.answer, **more}


def _outcome(measures: dict[str, Measure], predictions: list[dict[str, Any]], **more: Any) -> Outcome:
    figures = {name: measure.value for name, measure in measures.items()}
    return Outcome({**figures, "questions": len(predictions), **more}, tuple(measures.values()), predictions)
