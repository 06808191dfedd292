"""Answers in the model's own words, held against the right one: GSM8K and whatever is asked and answered in text.

The prompt is "Question: ...\\nAnswer:", greedy decoding ends at the model's end token or where a next question begins.
Where every right answer ends in a number, it is looked for as lm-evaluation-harness's gsm8k (version 3) does:
`strict-match` after "####", `flexible-extract` the last number there is; the answers are compared without commas,
dollar signs and a last full stop. Otherwise `exact_match` compares the whole answer, blanks at its ends and case apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpu_tune.data.formats import RowError, convert, own_format
from tpu_tune.errors import UserError, counted
from tpu_tune.inference.generation import Sampling, generate_ids
from tpu_tune.inference.model import Model
from tpu_tune.training.tasks.intervals import Measure, Outcome
from tpu_tune.training.tasks.questions import with_shots
from tpu_tune.training.tasks.task_rows import LocatedRow

STOPS = ("Question:", "</s>", "<|im_end|>")
_QUESTIONS = ("question", "input", "prompt", "instruction")
_ANSWERS = ("answer", "expected", "output", "completion", "target")
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NUMBER = re.compile(r"(?s)(.*#### )?\$?-?[0-9][0-9.,]*")
_BATCH = 16  # prompts that are answered together


def read_asked(rows: Sequence[LocatedRow]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (question, right answer, row) of each row.

    Raises:
      UserError: a row lacks one of them; says which.
    """
    asked = []
    for where, row in rows:
        try:
            asked.append((*_question_and_answer(row), row))
        except RowError as error:
            raise UserError(f"{where}: {error}") from error
    if not asked:
        raise UserError("there is no question to answer")
    return asked


def _question_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    format = own_format(row)
    if format not in ("messages", "sharegpt"):
        return _text(row, _QUESTIONS, "question"), _text(row, _ANSWERS, "answer")
    messages = [message for message in convert(row, format).messages if message["role"] != "system"]
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise RowError("a chat of other turns than one question and its answer")
    return messages[0]["content"], messages[1]["content"]


def _text(row: Mapping[str, Any], keys: Sequence[str], what: str) -> str:
    for key in keys:
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value
    raise RowError(f"no {what} (looked for {', '.join(keys)}); its keys: {', '.join(map(str, row))}")


def score_answers(
    model: Model,
    asked: Sequence[tuple[str, str, dict[str, Any]]],
    shots: int = 0,
    examples: Sequence[tuple[str, str, dict[str, Any]]] | None = None,
    max_new_tokens: int = 256,
    chat: bool | None = False,
) -> Outcome:
    """Let the model answer, and count.

    Args:
      model: any model.
      asked: (question, right answer, row), from `read_asked`.
      shots: solved examples before each question: the first of `examples`, or of `asked`, which are then not scored.
      max_new_tokens: the most tokens of an answer.
      chat: the bare question through the tokenizer's chat template instead, without examples; None: as the rows of the
        model's training asked.

    Returns:
      Figures `strict-match` and `flexible-extract`, or `exact_match`, and `questions`; predictions as QLoRA writes
      them: the row's keys, `prediction_with_input` and `prediction`, here with `correct`.

    Raises:
      UserError: too few examples, or examples for a chat.
    """
    bare = chat or chat is None
    if bare and shots:
        raise UserError("solved examples go with neither the chat template nor --as-taught; leave one of them out")
    pool = list(asked if examples is None else examples)
    if shots and len(pool) < shots + (examples is None):
        raise UserError(
            f"{counted(shots, 'solved example is', 'solved examples are')} asked for, and only "
            f"{counted(len(pool), 'row is', 'rows are')} there to take them from"
        )
    solved = [(_stem(question), answer) for question, answer, _ in pool[:shots]]
    asked = list(asked) if examples is not None else list(asked)[shots:]
    if bare:
        prompts = [question for question, _, _ in asked]
        encoded = [model.encode_prompt(prompt, chat) for prompt in prompts]
    else:
        prompts = [with_shots("", solved, _stem(question)) for question, _, _ in asked]
        encoded = [model.encode_prompt(prompt) for prompt in prompts]
    answers = [until(text, STOPS) for text in answer_all(model, encoded, Sampling(max_new_tokens))]
    numeric = all(_NUMBER.fullmatch(right.strip()) for _, right, _ in asked)
    rules: dict[str, Callable[[str, str], bool]] = (
        {"strict-match": strict, "flexible-extract": flexible} if numeric else {"exact_match": same_text}
    )
    measures = tuple(
        Measure.share(name, [is_right(answer, right) for answer, (_, right, _) in zip(answers, asked, strict=True)])
        for name, is_right in rules.items()
    )
    predictions = [
        {
            **row,
            "prediction_with_input": (prompt + answer).strip(),
            "prediction": answer.strip(),
            "correct": bool(measures[-1].terms[number]),
        }
        for number, (prompt, answer, (_, _, row)) in enumerate(zip(prompts, answers, asked, strict=True))
    ]
    figures = {measure.name: measure.value for measure in measures}
    return Outcome({**figures, "questions": len(asked)}, measures, predictions)


def _stem(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def answer_all(model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
    """Return the decoded answers to prompts of token ids, in their order; prompts of like length go together."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    answers = [""] * len(prompts)
    tokenizer = model.tokenizer
    if model.architecture.encoder and tokenizer.eos_token_id is not None:
        end = tokenizer.eos_token_id
        prompts = [ids if list(ids[-1:]) == [end] else [*ids, end] for ids in prompts]
    for start in range(0, len(order), _BATCH):
        numbers = order[start : start + _BATCH]
        batch = [prompts[number] for number in numbers]
        if start:
            batch += [batch[-1]] * (_BATCH - len(batch))  # the shape that is compiled already
        generated = generate_ids(model.architecture, model.params, batch, sampling, model.ends, model.dtype)
        for number, ids in zip(numbers, generated, strict=False):
            answers[number] = tokenizer.decode(ids, skip_special_tokens=True)
    return answers


def until(text: str, stops: Sequence[str]) -> str:
    """Return the text up to the first of the stops."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text


def strict(answer: str, right: str) -> bool:
    """Whether the number after "####" is the right one."""
    numbers = _STRICT.findall(answer)
    return _bare(numbers[0] if numbers else "[invalid]") == _bare(right)


def flexible(answer: str, right: str) -> bool:
    """Whether the last number of the answer is the right one."""
    numbers = _FLEXIBLE.findall(answer)
    last = next((group for group in numbers[-1] if group), "[invalid]") if numbers else "[invalid]"
    return _bare(last.strip()) == _bare(right)


def same_text(answer: str, right: str) -> bool:
    """Whether the answer is the right one, blanks at its ends and case apart."""
    return answer.strip().lower() == right.strip().lower()


def _bare(text: str) -> str:
    """What the harness compares: without commas, dollar signs, what stands before "#### ", and a last full stop."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()
