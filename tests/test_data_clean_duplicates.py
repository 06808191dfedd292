"""Exact and near duplicates, against brute force over all pairs."""

import functools
import json
import random

import pytest

from tpu_tune.data import clean
from tpu_tune.data.clean import CleanOptions, Duplicates
from tpu_tune.data.clean.duplicates import bands


@functools.cache
def ngrams(text, unit, size):
    """Shingles in the plainest way."""
    items = text if unit == "chars" else text.split(" ")
    return frozenset(
        items[i : i + size] if unit == "chars" else tuple(items[i : i + size])
        for i in range(max(1, len(items) - size + 1))
    )


def jaccard(a, b, unit="chars", size=5):
    a, b = ngrams(a, unit, size), ngrams(b, unit, size)
    return len(a & b) / len(a | b)


def planted(count, seed):
    """Lower-case texts, a third of them copies of earlier ones with up to five words replaced."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(500)]
    texts = []
    for _ in range(count):
        if texts and draw.random() < 0.35:
            changed = draw.choice(texts).split(" ")
            for _ in range(draw.randint(0, 5)):
                changed[draw.randrange(len(changed))] = draw.choice(words)
            texts.append(" ".join(changed))
        else:
            texts.append(" ".join(draw.choices(words, k=draw.randint(8, 40))))
    return texts


def keep(texts, **options):
    """Numbers of the texts that are kept."""
    options = CleanOptions(exact_duplicates=False, **options)
    found = Duplicates(options)
    kept = [number for number, text in enumerate(texts) if found.check({"text": text}, f"row {number}") is None]
    found.close()
    return kept


@pytest.mark.parametrize(
    "unit, size, threshold", [("chars", 5, 0.8), ("chars", 3, 0.5), ("words", 2, 0.6), ("chars", 5, 1.0)]
)
def test_near_duplicates_against_every_pair(unit, size, threshold):
    texts = planted(300, seed=1)
    brute = []
    for number, text in enumerate(texts):
        if not any(jaccard(text, texts[other], unit, size) >= threshold for other in brute):
            brute.append(number)
    kept = keep(texts, near_duplicates=threshold, shingle=unit, shingle_size=size)
    dropped = sorted(set(range(len(texts))) - set(kept))
    assert len(texts) - len(brute) > 10
    # Precision 1: each dropped row has an earlier one among those kept that is as similar as asked.
    for number in dropped:
        assert any(jaccard(texts[number], texts[other], unit, size) >= threshold for other in kept if other < number)
    # Recall: the index finds a pair at the threshold with probability 0.995, and more similar ones oftener.
    missed = [
        (a, b) for i, b in enumerate(kept) for a in kept[:i] if jaccard(texts[a], texts[b], unit, size) >= threshold
    ]
    assert len(missed) <= 0.01 * len(dropped)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold):
    count, hashes = bands(threshold)
    assert count * hashes <= 160 and 1 - (1 - threshold**hashes) ** count >= 0.995


def test_the_first_of_a_group_stays_and_the_hit_names_it():
    base = "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun all day long"
    texts = [
        "something else entirely, with other words",
        base,
        base.upper() + "!",
        base.replace(" ", "  \n"),
        base + " ok",
    ]
    found = Duplicates(CleanOptions(near_duplicates=0.8))
    hits = [found.check({"text": text}, f"f:{number}") for number, text in enumerate(texts)]
    assert [hit and hit.rule for hit in hits] == [None, None, "near duplicate", "exact duplicate", "near duplicate"]
    assert hits[2].snippet.startswith(f"{jaccard(base, base + '!'):.2f} like f:1: the quick")


def test_a_chain_keeps_what_is_unlike_all_that_were_kept():
    words = [f"word{n:02d}" for n in range(40)]
    chain = [" ".join(f"x{i:02d}{n:03d}" if i < 6 * n else word for i, word in enumerate(words)) for n in range(3)]
    assert jaccard(chain[0], chain[1]) >= 0.7 > jaccard(chain[0], chain[2])
    assert keep(chain, near_duplicates=0.7) == [0, 2]


def test_short_and_empty_texts():
    assert keep(["", "", "a", "A", "abc", "abd", "   "], near_duplicates=0.8) == [0, 1, 2, 4, 5, 6]


def test_the_same_seed_drops_the_same_rows():
    texts = planted(300, seed=2)
    assert keep(texts, near_duplicates=0.6, seed=3) == keep(texts, near_duplicates=0.6, seed=3)


def test_exact_duplicates_look_at_roles_texts_and_tools_only():
    def chat(text="b", role="assistant", **more):
        return {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": text}], **more}

    call = {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "y": 2}}}]}
    other = {"tool_calls": [{"function": {"name": "f", "arguments": {"y": 1, "x": 2}}}]}
    rows = [
        (chat(), True),
        (chat(" b\n"), False),
        (chat(id=5), False),
        (chat("B"), True),
        (chat(role="user"), True),
        (chat(tools=[{"name": "f"}]), True),
        ({"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]}, False),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, **call}]}, True),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, **other}]}, True),
        ({"input": "a", "output": "b c"}, True),
        ({"input": "a b", "output": "c"}, True),
        ({"output": "b c", "input": "a", "score": 1}, False),
        ({"instruction": "a", "output": "b c"}, True),
        ({"instruction": "a", "input": None, "output": "b c"}, False),
        ({"text": "caf\u00e9 \ud83d"}, True),
        ({"text": "cafe\u0301 \ud83d"}, False),
    ]
    found = Duplicates(CleanOptions())
    assert [found.check(row) is None for row, _ in rows] == [new for _, new in rows]


def test_the_texts_compared_are_those_after_the_repairs(tmp_path):
    source = tmp_path / "in.jsonl"
    rows = [{"text": f"Write to {name}@example.com, please."} for name in ("joe", "jane")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = clean.clean([source], tmp_path / "out.jsonl", CleanOptions(mask_email=True))
    assert figures["rows_out"] == 1 and figures["rules"][0]["rule"] == "e-mail masked"
    assert clean.clean([source], None, CleanOptions(), dry_run=True)["rows_out"] == 2


def test_the_benchmark_on_few_rows(tmp_path, monkeypatch):
    """A thousand rows of the benchmark: nothing false, next to nothing missed."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[1] / "benchmarks" / "data_dedup.py"
    spec = importlib.util.spec_from_file_location("data_dedup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figures = module.measure(1000)
    assert figures["planted"] > 50 and figures["recall"] >= 0.98 and figures["false_drops"] == 0
