"""`data cluster` from end to end: planted topics, the same bytes again, subsets, outliers, the map, bad input."""

import dataclasses
import gzip
import json
import pathlib
import re

import bs4
import numpy as np
import pytest
from helpers_training import write_tiny_llama

from tpu_tune.cli import main
from tpu_tune.data.cluster import ClusterOptions, cluster
from tpu_tune.data.cluster.cluster_map import project, top_words
from tpu_tune.data.cluster.features import tfidf_features, wordless
from tpu_tune.errors import UserError

TOPICS = {
    "cooking": "oven flour butter sugar bake dough recipe salt pepper simmer sauce garlic onion whisk pan roast",
    "space": "orbit planet telescope rocket galaxy comet gravity astronaut lunar satellite nebula launch mission",
    "law": "court judge contract plaintiff verdict statute appeal clause lawyer trial evidence liability jury tort",
}
COMMON = "the a of and to in is it that for with as on was by".split()
EACH = 40
NASTY = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> & $\\frac$ \u2028 zzz'


def planted(seed=0):
    """Rows of three topics in any order, with keys of their own, some of them nested."""
    random = np.random.RandomState(seed)
    rows = []
    for topic, words in TOPICS.items():
        for _ in range(EACH):
            drawn = [
                random.choice(words.split()) if random.rand() < 0.6 else random.choice(COMMON)
                for _ in range(random.randint(10, 30))
            ]
            rows.append({"text": " ".join(drawn), "topic": topic, "meta": {"n": len(rows), "é": [None, 1.5]}})
    random.shuffle(rows)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def purity(rows):
    """The share of rows whose topic is their cluster's commonest."""
    clusters = {row["cluster"] for row in rows}
    return sum(
        max(sum(row["cluster"] == c and row["topic"] == topic for row in rows) for topic in TOPICS) for c in clusters
    ) / len(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def source(folder):
    rows = planted()
    rows[5]["text"] += " " + NASTY
    return write(folder / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def done(source, folder):
    """(report, output, options) of a run over everything, with a map."""
    output = folder / "all" / "rows.jsonl"
    options = ClusterOptions(k=3, map=str(folder / "all" / "map.html"), outliers=str(folder / "all" / "far.jsonl"))
    return cluster(source, str(output), options), output, options


def test_planted_topics_are_found(done, source):
    report, output, _ = done
    rows = read(output)
    assert purity(rows) == 1.0
    assert [cluster["rows"] for cluster in report["clusters"]] == [EACH] * 3
    for told in report["clusters"]:
        topic = next(row["topic"] for row in rows if row["cluster"] == told["cluster"])
        assert set(told["words"]) <= {*TOPICS[topic].split(), *re.findall(r"\w{2,}", NASTY)}
    # All keys stay, in order, and two are added; so do the rows.
    before = read(source)
    assert [{k: v for k, v in row.items() if k not in ("cluster", "distance")} for row in rows] == before
    assert list(rows[0]) == ["text", "topic", "meta", "cluster", "distance"]


def test_auto_finds_how_many_there_are(source, folder):
    report = cluster(source, str(folder / "auto.jsonl"), ClusterOptions())
    assert report["k"] == 3 and max(report["tried"], key=report["tried"].get) == "3"
    assert purity(read(folder / "auto.jsonl")) == 1.0
    assert report["hints"] == ["120 rows are few: a small set needs no clustering, and can go on as it is"]


def test_a_model_tells_topics_apart(folder):
    """With the bytes of three scripts, which even a random model can tell apart."""
    model = write_tiny_llama(folder / "tiny")
    random = np.random.RandomState(0)
    letters = {"cooking": "abcdefgh", "space": "жзийклмн", "law": "0123456789"}
    rows = [
        {
            "prompt": "".join(random.choice(list(letters[topic]), random.randint(20, 33))),
            "completion": " ",
            "topic": topic,
        }
        for topic in [*letters] * 20
    ]
    source = write(folder / "scripts.jsonl", rows)
    options = ClusterOptions(k=3, model=str(model), max_length=32, batch_tokens=1024)
    report = cluster(source, str(folder / "scripts.out.jsonl"), options)
    assert purity(read(folder / "scripts.out.jsonl")) == 1.0
    assert report["dimensions"] == 32


def test_the_same_seed_gives_the_same_bytes(done, source, folder):
    _, output, options = done
    again = folder / "again"
    options = dataclasses.replace(options, map=str(again / "map.png"), outliers=str(again / "far.jsonl"))
    cluster(source, str(again / "rows.jsonl"), options)
    names = ["far.jsonl", "map.html", "map.png", "rows.jsonl"]
    assert sorted(path.name for path in again.iterdir()) == names  # nothing is left beside them
    for name in names:
        assert (again / name).read_bytes() == (output.parent / name).read_bytes(), name


@pytest.mark.parametrize("way", ["balanced", "farthest", "random"])
def test_a_part_of_each_cluster(done, source, folder, way):
    output = folder / f"{way}.jsonl"
    report = cluster(source, str(output), ClusterOptions(k=3, keep=30, select=way))
    whole = {row["meta"]["n"]: row for row in read(done[1])}
    rows = read(output)
    assert [sum(row["cluster"] == c for row in rows) for c in range(3)] == [10, 10, 10]
    assert [told["kept"] for told in report["clusters"]] == [10, 10, 10] and report["kept"] == 30
    assert all(row == whole[row["meta"]["n"]] for row in rows)
    order = [list(whole).index(row["meta"]["n"]) for row in rows]
    assert order == sorted(order)


def test_outliers_are_listed_and_never_in_a_part(folder):
    rows = planted() + [{"text": "?!", "topic": "noise", "meta": {"n": -1}}]
    source, output, far = write(folder / "noise.jsonl", rows), folder / "part.jsonl", folder / "far.jsonl"
    options = ClusterOptions(k=3, keep_per_cluster=1000, outliers=str(far))
    report = cluster(source, str(output), options)
    listed = read(far)
    assert report["outliers"] == len(listed)
    assert listed[-1]["text"] == "?!" and listed[-1]["reason"] == "none of its words is in the vocabulary"
    assert len(read(output)) == len(rows) - len(listed)
    assert {row["meta"]["n"] for row in read(output)}.isdisjoint(row["meta"]["n"] for row in listed)


def test_the_page_says_all_and_loads_nothing(done, source):
    report, output, options = done
    text = pathlib.Path(options.map).read_text(encoding="utf-8")
    page = bs4.BeautifulSoup(text, "lxml")
    assert not page.find_all(["img", "link", "iframe"]) and len(page.find_all("script")) == 2
    assert not re.search(r"""(?:src|href)\s*=\s*["']|url\(|https?://""", re.sub("<li>.*?</li>", "", text))
    assert "default-src 'none'" in text
    points = page.select("circle.p")
    data = json.loads(page.find("script", id="data").string)
    rows = read(output)
    assert len(points) == len(data["texts"]) == len(data["labels"]) == len(rows)
    for row, label, shown, point in zip(rows, data["labels"], data["texts"], points, strict=True):
        assert label == row["cluster"] and f"c{label}" in point["class"]
        assert " ".join(row["text"].split()).startswith(shown.rstrip("…"))
    cells = [line.find_all("td") for line in page.select("tbody tr")]
    assert [cell[1].get_text() for cell in cells] == [str(told["rows"]) for told in report["clusters"]]
    for told, cell in zip(report["clusters"], cells, strict=True):
        assert all(word in cell[4].get_text() for word in told["words"])
        assert [item.get_text() for item in cell[4].find_all("li")] == told["examples"]


def test_the_picture_is_one(done):
    from matplotlib.image import imread

    image = imread(pathlib.Path(done[2].map).with_suffix(".png"))
    assert image.shape[:2] == (960, 1440)
    assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 100


def test_the_map_is_pca():
    from sklearn.decomposition import PCA

    data = np.random.RandomState(0).randn(50, 6) * [3, 2, 1, 1, 1, 1] + 5
    points, centers, share = project(data, data[:2])
    expected = PCA(2).fit(data)
    np.testing.assert_allclose(np.abs(points), np.abs(expected.transform(data)), atol=1e-8)
    np.testing.assert_allclose(centers, points[:2], atol=1e-8)
    assert share == pytest.approx(expected.explained_variance_ratio_.sum())


def test_words_that_tell_clusters_apart():
    texts = ["the red apple", "the red cherry", "the blue sea", "the blue sky 99"]
    assert top_words(texts, np.array([0, 0, 1, 1]), 3, count=1) == [["red"], ["blue"], []]


def test_tfidf_of_a_word_of_all_rows_is_nothing(tmp_path):
    """And the reduced vectors keep the angles of the whole ones."""
    texts = ["the sea the ship", "the sea the fish", "the sky", "the sky 東京", "...", "the"]
    found = np.array(tfidf_features(texts, [texts[:2], texts[2:]], len(texts), tmp_path / "x.npy", 0))
    rows = [["sea", "ship"], ["sea", "fish"], ["sky"], ["sky", "東", "京"]]
    words = sorted({word for row in rows for word in row})
    counts = np.array([[word in row for word in words] for row in rows], float)
    expected = counts * np.log((1 + 6) / (1 + counts.sum(axis=0)))
    the = np.log((1 + 6) / (1 + 5))
    twice = np.array([1 + np.log(2), 1 + np.log(2), 1, 1]) * the
    expected = np.concatenate([expected, twice[:, None]], axis=1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found[:4] @ found[:4].T, expected @ expected.T, atol=1e-5)
    assert wordless(found).tolist() == [4]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


ROWS = [{"text": f"word{number % 4} sea ship"} for number in range(6)]


@pytest.mark.parametrize(
    "rows, options, words",
    [
        (ROWS, {"k": 7}, "has 6 rows, too few for 7 clusters; lower --k"),
        ([], {}, "no row with a text"),
        ([{"text": ""}], {}, "rows.jsonl:1: no text; fix it, or give --skip-bad"),
        ([{"text": " "}], {"skip_bad": True}, "no row with a text; the first bad row is .*rows.jsonl:1: no text"),
        ([*ROWS, {"txt": "a"}], {"k": 2}, "rows.jsonl:7: no 'text'"),
        ([{"body": "a"}], {}, "which of the first row's keys is the text. They are: body; name one with --text-key"),
        ([{"body": 3.5, "x": None}], {"text_key": "x"}, "'x' must be a string, not null"),
        ([{"text": "..."}], {}, "no words to tell them apart"),
        (ROWS, {"k": 2, "keep": 3, "keep_per_cluster": 1}, "exclude each other"),
        (ROWS, {"k": 2, "keep": 0}, "--keep is 0; it must be at least 1"),
        (ROWS, {"k": 0}, "--k is 0"),
        (ROWS, {"select": "best"}, "--select is 'best'"),
        (ROWS, {"map": "map.svg"}, "its name must end in .html or .png"),
        (ROWS, {"k": 2, "outliers": "{input}"}, "is named twice"),
    ],
)
def test_bad_input(tmp_path, rows, options, words):
    source = write(tmp_path / "rows.jsonl", rows)
    options = {key: value.format(input=source) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError, match=words) as raised:
        cluster(source, str(tmp_path / "out.jsonl"), ClusterOptions(**options))
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_bad_rows_are_counted_and_left_out(source, folder):
    lines = pathlib.Path(source).read_bytes().splitlines(keepends=True)
    bad = folder / "bad.jsonl.gz"
    with gzip.open(bad, "wb") as file:
        file.writelines([*lines[:3], b'{"text": \n', b"\xff\n", b'{"text": null}\n', b"\n", *lines[3:]])
    report = cluster(str(bad), str(folder / "good.jsonl.gz"), ClusterOptions(k=3, skip_bad=True))
    assert (report["rows"], report["bad_rows"]) == (3 * EACH, 3)
    assert [text.rsplit(":", 2)[1] for text in report["bad_examples"]][:2] == ["4", "5"]
    with gzip.open(folder / "good.jsonl.gz", "rt", encoding="utf-8") as file:
        assert purity([json.loads(line) for line in file]) == 1.0


@pytest.mark.parametrize(
    "row, text",
    [
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "sea"}]}, "sea"),
        ({"instruction": "do", "input": "", "output": "done"}, "do\ndone"),
        ({"instruction": "do", "input": "it", "output": "done"}, "do\nit\ndone"),
        ({"prompt": "a", "generation": "b"}, "a\nb"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, "hi\nyo"),
    ],
)
def test_the_text_of_a_row(tmp_path, row, text):
    from tpu_tune.data.cluster.row_texts import read_texts
    from tpu_tune.data.streams import Skipped

    assert list(read_texts(write(tmp_path / "rows.jsonl", [row]), "", Skipped())) == [(row, text)]


def test_the_command(source, folder, capsys):
    words = ["data", "cluster", source, "--output", str(folder / "cli.jsonl"), "--k", "3", "--keep-per-cluster", "2"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "120 rows in 3 clusters" in captured.out and "6 rows kept in" in captured.out
    assert captured.err == "note: 120 rows are few: a small set needs no clustering, and can go on as it is\n"
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kept"] == 6 and report["options"]["keep_per_cluster"] == 2
    assert main([*words, "--k", "many"]) == 1
    assert capsys.readouterr().err == "tpu-tune: --k is 'many'; give a number, or auto\n"
    with pytest.raises(SystemExit):
        main(["data", "cluster", "--help"])
    example = capsys.readouterr().out.rstrip().rsplit("\n", 1)[-1].split()
    from tpu_tune import cli

    assert cli._parser().parse_args(example[1:]).command == "data cluster"


@pytest.mark.slow  # SmolLM2 reads 60 rows: half a minute on two cores
def test_smollm2_tells_topics_apart(smollm2_gguf, folder):
    openings = {
        "cooking": ["Preheat the oven and mix the flour with", "Simmer the sauce with", "For this recipe you need"],
        "space": ["The telescope found a planet near", "The rocket went into orbit with", "Astronomers measured"],
        "law": [
            "The court heard the plaintiff about",
            "The judge asked the jury about",
            "The contract has a clause on",
        ],
    }
    random = np.random.RandomState(0)
    rows = [
        {
            "text": f"{random.choice(openings[topic])} {', '.join(random.choice(TOPICS[topic].split(), 4))}.",
            "topic": topic,
        }
        for topic in [*TOPICS] * 20
    ]
    source = write(folder / "sentences.jsonl", rows)
    cluster(source, str(folder / "smollm2.jsonl"), ClusterOptions(k=3, model=str(smollm2_gguf), batch_tokens=1024))
    assert purity(read(folder / "smollm2.jsonl")) == 1.0
