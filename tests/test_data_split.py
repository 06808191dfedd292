"""`tpu-tune data split`: the guide's ratios and messages, exact counts, groups and strata, the laws of any split."""

import gzip
import json
import os
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_tune.cli import main
from tpu_tune.data.split import MANY_ROWS, SplitOptions, parse_ratio, rule, split_file
from tpu_tune.errors import UserError


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """10,000 rows of 50 conversations and three clusters, the smallest of 100 rows."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    cluster = ["small"] * 100 + ["middle"] * 2900 + ["large"] * 7000
    file.write_text(
        "".join(
            json.dumps({"text": f"row {i}", "meta": {"chat": i % 50}, "cluster": cluster[i]}) + "\n"
            for i in range(10_000)
        )
    )
    return file


def split(capsys, directory, *words):
    """Run the command; return (figures, lines of train.jsonl, lines of val.jsonl)."""
    status = main(["data", "split", "--json", "--output-dir", str(directory), *map(str, words)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out), *((directory / name).read_bytes().splitlines(True) for name in NAMES)


def refusal(capsys, directory, *words):
    status = main(["data", "split", "--output-dir", str(directory / "out"), *map(str, words)])
    captured = capsys.readouterr()
    assert status == 1 and captured.out == "" and captured.err.count("\n") == 1
    assert not (directory / "out").exists() or not list((directory / "out").iterdir())  # nothing half-written
    return captured.err.removeprefix("tpu-tune: ").rstrip("\n")


NAMES = ("train.jsonl", "val.jsonl")


def test_the_guides_split(rows, tmp_path, capsys):
    """Each row is for training if uniform(0, sum) < train_ratio; only the relation counts; same seed, same bytes."""
    found, train, validation = split(capsys, tmp_path / "a", "--input", rows, "--split_ratio", "0.99,0.01")
    assert abs(len(train) - 9900) <= 40 and (found["train_rows"], found["val_rows"]) == (len(train), len(validation))
    draws = random.Random(42)  # the definition itself, beside the library's code
    sides = [draws.uniform(0, 100) < 99 for _ in range(10_000)]
    lines = rows.read_bytes().splitlines(True)
    assert train == [line for line, is_train in zip(lines, sides, strict=True) if is_train]
    assert validation == [line for line, is_train in zip(lines, sides, strict=True) if not is_train]
    assert split(capsys, tmp_path / "b", rows, "--split-ratio", "99,1")[1:] == (train, validation)
    assert split(capsys, tmp_path / "c", rows, "--split-ratio", "99,1", "--seed", 7)[2] != validation


@pytest.mark.parametrize("ratio", ["0.99", "0.9,0.05,0.05", "a,b", "", "0.99;0.01"])
def test_malformed_ratios(rows, tmp_path, capsys, ratio):
    said = refusal(capsys, tmp_path, "--input", rows, "--split_ratio", ratio)
    assert said == "Invalid split_ratio format. Please use 'train_ratio,val_ratio'"


@pytest.mark.parametrize("ratio", ["0,1", "1,0", "1,-1", "-1,2", "nan,1", "inf,1"])
def test_ratios_that_are_not_above_0(rows, tmp_path, capsys, ratio):
    said = refusal(capsys, tmp_path, "--input", rows, f"--split_ratio={ratio}")
    assert said == "Invalid ratios. train_ratio and val_ratio must be greater than 0."


def test_writes_into_the_working_directory(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "split", "--input", str(rows), "--split_ratio", "0.99,0.01"]) == 0
    assert sorted(os.listdir(tmp_path)) == list(NAMES)


@pytest.mark.parametrize(
    ("count", "wanted"), [(2, 1), (999, 1), (10_000, 10), (MANY_ROWS - 1, 1000), (MANY_ROWS, 100), (50_000_000, 5000)]
)
def test_the_rule_of_thumb(count, wanted):
    assert rule(count) == wanted


def test_auto_follows_the_rule_of_thumb(rows, tmp_path, capsys):
    assert len(split(capsys, tmp_path, rows, "--auto")[2]) == 10
    assert len(split(capsys, tmp_path, rows)[2]) == 10  # as without any size
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a"}\n{"text": "b"}')
    assert [len(part) for part in split(capsys, tmp_path, few)[1:]] == [1, 1]
    few.write_text('{"text": "a"}\n')
    assert "few.jsonl: only 1 row: there is none to hold out" in refusal(capsys, tmp_path, few)


def test_exact_count(rows, tmp_path, capsys):
    found, train, validation = split(capsys, tmp_path, rows, "--val-count", 1234)
    assert len(validation) == 1234 and found["train_rows"] == 8766
    # Every part of the file has its share: 1234 of 10000 in each tenth, within five standard deviations.
    places = Counter(int(json.loads(line)["text"].split()[1]) // 1000 for line in validation)
    assert all(abs(places[tenth] - 123.4) < 52 for tenth in range(10))
    for count in (0, 10_000):
        assert "--val-count" in refusal(capsys, tmp_path, rows, "--val-count", count)


@pytest.mark.parametrize("size", [("--split-ratio", "9,1"), ("--val-count", 700), ("--auto",)])
def test_no_group_in_both(rows, tmp_path, capsys, size):
    _, train, validation = split(capsys, tmp_path, rows, "--group-key", "meta.chat", *size)
    groups = [{json.loads(line)["meta"]["chat"] for line in part} for part in (train, validation)]
    assert all(groups) and not groups[0] & groups[1] and len(groups[0] | groups[1]) == 50
    if size[0] == "--val-count":
        assert len(validation) == 800  # whole groups of 200
    if size[0] == "--auto":
        assert len(validation) == 200


def test_a_group_goes_the_same_way_in_another_file(rows, tmp_path, capsys):
    options = ("--group-key", "meta.chat", "--split-ratio", "9,1")
    whole = split(capsys, tmp_path, rows, *options)[2]
    part = tmp_path / "part.jsonl"
    part.write_bytes(b"".join(rows.read_bytes().splitlines(True)[5000:]))
    assert split(capsys, tmp_path, part, *options)[2] == [
        line for line in whole if int(json.loads(line)["text"][4:]) > 4999
    ]


@pytest.mark.parametrize("size", [("--split-ratio", "0.9,0.1"), ("--val-count", 1000)])
def test_strata_have_the_same_share(rows, tmp_path, capsys, size):
    found, _, validation = split(capsys, tmp_path, rows, "--stratify", "cluster", *size)
    counts = Counter(json.loads(line)["cluster"] for line in validation)
    assert counts == {"small": 10, "middle": 290, "large": 700} == found["strata"]


def test_lines_are_copied_as_they_are(tmp_path, capsys):
    lines = [
        b'\xef\xbb\xbf{"a":1}\r\n',
        b'  {"a" : "\xf0\x9f\x98\x80\\u00e9"}\n',
        b"not json\n",
        b'{"a": "\xff"}\n',
        b"{}",
    ]
    file = tmp_path / "odd.jsonl"
    file.write_bytes(b"\n".join(lines[:1]) + b"\n \n".join(lines[1:3]) + b"".join(lines[3:]))
    _, train, validation = split(capsys, tmp_path / "out", file, "--val-count", 2)
    assert sorted(train + validation) == sorted(lines)
    packed = tmp_path / "odd.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert split(capsys, tmp_path / "out", packed, "--val-count", 2)[1:] == (train, validation)


def test_an_empty_validation_file_is_said_aloud(tmp_path, caplog):
    file = tmp_path / "few.jsonl"
    file.write_text('{"text": "a"}\n' * 5)
    found = split_file(file, tmp_path / "out", SplitOptions(share=0.001))
    assert found["val_rows"] == 0 and (tmp_path / "out" / "val.jsonl").read_bytes() == b""
    assert "val.jsonl is empty: none of the 5 rows was drawn" in caplog.text


def test_complaints(rows, tmp_path, capsys):
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": "a", "id": 1}\n{"text": "b"}\n{"text": "c", "id": 2}\n')
    assert refusal(capsys, tmp_path, file, "--group-key", "id", "--split-ratio", "1,1") == (
        f"{file}:2: the row has no 'id'; its keys: text; fix it, or give --skip-bad to go on without it"
    )
    found, *parts = split(capsys, tmp_path / "b", file, "--group-key", "id", "--val-count", 1, "--skip-bad")
    assert (found["bad_rows"], len(parts[0]), len(parts[1])) == (1, 1, 1)
    assert main(["data", "split", str(file), "--output-dir", str(tmp_path), "--val-count", "1"]) == 1
    assert "would overwrite its own input" in capsys.readouterr().err and len(file.read_bytes().splitlines()) == 3
    assert "nowhere.jsonl: cannot be read" in refusal(capsys, tmp_path, "nowhere.jsonl", "--split-ratio", "1,1")
    same = tmp_path / "same.jsonl"
    same.write_text('{"id": 1}\n' * 9)
    assert "take every value of 'id' (1)" in refusal(capsys, tmp_path, same, "--group-key", "id", "--val-count", 3)
    same.write_text("\n\n")
    assert "same.jsonl: no rows" in refusal(capsys, tmp_path, same, "--split-ratio", "1,1")


def test_a_line_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("tpu_tune.data.streams.MAX_ROW_BYTES", 100)
    file = tmp_path / "long.jsonl"
    file.write_text('{"text": "a"}\n' + '{"text": "' + "b" * 500 + '"}\n{"text": "c"}\n')
    with pytest.raises(UserError, match=r"long.jsonl:2: the line is longer than"):
        split_file(file, tmp_path / "out", SplitOptions(count=1))
    found = split_file(file, tmp_path / "out", SplitOptions(count=1), skip_bad=True)
    assert (found["train_rows"], found["val_rows"], found["bad_rows"]) == (1, 1, 1)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 4), min_size=2, max_size=40),
    size=st.sampled_from(["share", "count", "auto"]),
    keys=st.sampled_from([{}, {"group_key": "k"}, {"stratify_key": "k"}]),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_any_split_is_a_partition_in_order(tmp_path_factory, values, size, keys, share, seed):
    """The union of the two files is the input, no line is in both, each keeps the order; and the seed decides all."""
    directory = tmp_path_factory.mktemp("law")
    file = directory / "in.jsonl"
    file.write_text("".join(json.dumps({"n": n, "k": k}) + "\n" for n, k in enumerate(values)))
    wish = {"share": {"share": share}, "count": {"count": 1}, "auto": {}}[size]
    options = SplitOptions(**wish, **keys, seed=seed)
    try:
        found = split_file(file, directory / "out", options)
    except UserError as error:
        assert "every value of 'k' (1)" in str(error) and len(set(values)) == 1
        return
    parts = [[json.loads(line)["n"] for line in open(directory / "out" / name)] for name in NAMES]
    assert sorted(parts[0] + parts[1]) == list(range(len(values)))
    assert all(part == sorted(part) for part in parts)
    if size == "count" and "group_key" not in keys:
        assert len(parts[1]) == 1
    if "group_key" in keys:
        assert not {values[n] for n in parts[0]} & {values[n] for n in parts[1]}
    if "stratify_key" in keys and size == "share":
        held = Counter(values[n] for n in parts[1])
        for value, count in Counter(values).items():
            assert abs(held[value] - count * len(parts[1]) / len(values)) < 1
    split_file(file, directory / "again", options)
    assert all((directory / "out" / name).read_bytes() == (directory / "again" / name).read_bytes() for name in NAMES)
    assert found["rows"] == len(values)


def test_only_the_relation_of_the_ratios_counts():
    assert parse_ratio("99,1") == parse_ratio("0.99,0.01") == parse_ratio(" 9.9 , 0.1 ") == 0.01
