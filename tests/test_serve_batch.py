"""The running batch of `tpu-tune serve`: answers that begin and end at different times are those of each one alone."""

from __future__ import annotations

import types

import numpy as np
import pytest
import tiny_models

from tpu_tune.inference import Sampling, generate_ids
from tpu_tune.inference.pieces import Pieces
from tpu_tune.inference.serving import engine as serving
from tpu_tune.inference.serving.batch import size
from tpu_tune.inference.serving.engine import Job, Lane, Limits, News


@pytest.mark.parametrize(
    "case",
    tiny_models.mostly_slow(
        ["mistral_window", "qwen3_5", "gemma4", "gpt2", "llama_dynamic", "gpt_oss"], ["mistral_window"]
    ),
)
def test_rows_come_and_go_while_others_write(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In caches so small that they have to grow and to move; the last cancelled before its end."""
    monkeypatch.setattr(serving, "_COLUMNS", 32)
    arch, params = tiny_models.load(tiny_models.CONFIGS[case])
    model = types.SimpleNamespace(architecture=arch, params=params, dtype=np.dtype("float32"), ends=())
    lane = Lane(model, Limits(slots=3, max_length=56))
    random = np.random.default_rng(3)
    jobs, told = [], []
    for length, count in [(3, 9), (40, 12), (5, 20), (2, 22), (7, 5), (20, 6), (4, 24)]:
        prompt = random.integers(0, arch.vocab_size, length).tolist()
        news: list[News] = []
        jobs.append(Job("", prompt, Sampling(count), None, news.append))
        told.append(news)
    waiting = list(jobs)
    while waiting or lane.jobs:
        if waiting and len(lane.jobs) < 3:
            lane.join(waiting.pop(0))
        if not waiting and len(told[-1]) > 3:
            jobs[-1].cancelled = True
        lane.let_go()
        if lane.jobs:
            lane.write()
    alone = generate_ids(arch, params, [job.prompt for job in jobs], Sampling(24), (), "float32")
    for job, news, expected in zip(jobs, told, alone, strict=True):
        found = [token.id for one in news for token in one.tokens]
        assert found == expected[: len(found)] and (job.cancelled or len(found) == job.sampling.max_new_tokens)
        assert [one.ended for one in news if one.ended] == ([] if job.cancelled else ["length"])
    assert jobs[-1].cancelled and 4 <= len(told[-1]) < 12


def test_sizes_go_in_steps() -> None:
    assert [size(count, 4) for count in (1, 2, 4, 5, 17)] == [1, 4, 4, 16, 64]
    assert size(33, smallest=32) == 64


class Letters:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("aé€b", (), ["a", "é", "€", "b"]),
        ("one two", ("tw",), ["o", "n", "e", " "]),
        ("a stork stops", ("stop",), ["a", " ", "stor", "k", " "]),
        ("ends in st", ("stop",), ["e", "n", "d", "s ", "i", "n", " ", "st"]),
    ],
)
def test_pieces_hold_back_what_may_begin_a_stop(text: str, stops: tuple[str, ...], expected: list[str]) -> None:
    pieces, found = Pieces(Letters(), stops), []
    for byte in text.encode():
        found.append(pieces.add([byte]))
        if pieces.stopped:
            break
    assert [piece for piece in [*found, pieces.rest()] if piece] == expected
    assert pieces.stopped == any(stop in text for stop in stops)
