"""`tpu-tune eval`: each task against the arithmetic of its source, intervals against scipy, and bad input."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from helpers_eval import log_softmax, padded_logits, write_run
from helpers_training import write_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import tpu_tune
from tpu_tune.cli import main
from tpu_tune.errors import UserError
from tpu_tune.training.evaluate_only import evaluate_only
from tpu_tune.training.tasks import Measure, compare, exact_match, interval, mmlu
from tpu_tune.training.tasks.intervals import wilson
from tpu_tune.training.tasks.multiple_choice import by_letter, by_likelihood, letter_tokens
from tpu_tune.training.tasks.questions import TRUTHFULQA_PRIMER, read_questions, with_shots
from tpu_tune.training.tasks.task_rows import read_task_rows


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tiny(tiny_dir):
    return tpu_tune.load(str(tiny_dir))


@pytest.fixture(scope="module")
def run(tiny_dir, tmp_path_factory):
    return write_run(tiny_dir, tmp_path_factory.mktemp("run"))


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def placed(rows):
    return [(f"rows.jsonl, row {number}", row) for number, row in enumerate(rows, start=1)]


def evaluated(capsys, *words):
    capsys.readouterr()
    status = main(["eval", *map(str, words), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


# --- MMLU, as QLoRA scores it ---------------------------------------------------------------------------------------


def toy_mmlu(count=11):
    return [
        {
            "subject": ("law", "art", "art")[n % 3],
            "input": f"{'word ' * n}What is {n}?\nAnswer:",
            "output": "ABCD"[n % 4],
        }
        for n in range(count)
    ]


def as_qlora(model, rows, source_max_len, batch_size):
    """The collator and the callback of qlora.py over plain logits: ids and labels, argmax before the label, means."""
    tokenizer = model.tokenizer
    letters = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "ABCD"]
    losses, right = [], {}
    for start in range(0, len(rows), batch_size):
        sums, count = 0.0, 0
        for row in rows[start : start + batch_size]:
            source = tokenizer(f"{tokenizer.bos_token}{row['input']}", add_special_tokens=False).input_ids
            target = tokenizer(f"{row['output']}{tokenizer.eos_token}", add_special_tokens=False).input_ids
            source = source[:source_max_len]
            logits = padded_logits(model, source + target)
            logs = log_softmax(logits[:-1])
            labels = np.array([-100] * len(source) + target)
            kept = np.flatnonzero(labels[1:] != -100)
            sums, count = sums - logs[kept, labels[1:][kept]].sum(), count + len(kept)
            first = int(np.flatnonzero(labels != -100)[0])
            guess = int(np.argmax(logits[first - 1][letters]))
            right.setdefault(row["subject"], []).append(guess == letters.index(labels[labels != -100][0]))
        losses.append(sums / count)
    return float(np.mean(losses)), {subject: float(np.mean(values)) for subject, values in right.items()}


@pytest.mark.parametrize(("source_max_len", "batch_size"), [(2048, 8), (24, 4)])
def test_mmlu_is_qloras_arithmetic(tiny, source_max_len, batch_size):
    rows = toy_mmlu()
    found = mmlu.score_mmlu(tiny, mmlu.prompts_of(placed(rows)), "eval", source_max_len, batch_size)
    loss, subjects = as_qlora(tiny, rows, source_max_len, batch_size)
    assert {s: found.figures[f"mmlu_eval_accuracy_{s}"] for s in subjects} == subjects
    assert found.figures["mmlu_eval_accuracy"] == pytest.approx(np.mean(list(subjects.values())), abs=1e-12)
    assert found.figures["mmlu_loss"] == pytest.approx(loss, rel=1e-6)
    assert (found.figures["truncated"] > 0) == (source_max_len == 24)


def test_known_answers_give_one_and_the_mean_is_over_subjects(tiny, tmp_path, capsys):
    rows = toy_mmlu(8)
    guessed = mmlu.score_mmlu(tiny, mmlu.prompts_of(placed(rows))).predictions
    known = [{**row, "output": guess["prediction"]} for row, guess in zip(rows, guessed, strict=True)]
    (tmp_path / "five_shot_mmlu_val.json").write_text("".join(json.dumps(row) + "\n" for row in known))
    words = ("--model", tiny.source.path, "--task", "mmlu", "--data", tmp_path, "--shots", 5, "--split", "val")
    assert evaluated(capsys, *words)["mmlu_eval_accuracy"] == 1.0
    wrong = next(i for i, row in enumerate(known) if row["subject"] == "law")
    known[wrong]["output"] = "ABCD"["ABCD".index(known[wrong]["output"]) - 1]
    (tmp_path / "five_shot_mmlu_val.json").write_text("".join(json.dumps(row) + "\n" for row in known))
    found = evaluated(capsys, *words)
    assert found["mmlu_eval_accuracy_law"] == pytest.approx(2 / 3) and found["mmlu_eval_accuracy_art"] == 1
    assert found["mmlu_eval_accuracy"] == pytest.approx(5 / 6)


def test_mmlus_own_questions_get_qloras_prompts():
    rows = [
        {"question": f"Q{n}", "choices": ["p", "q", "r", "s"], "answer": n % 4, "subject": "abstract_algebra"}
        for n in range(3)
    ]
    zero = mmlu.prompts_of(placed(rows))
    assert zero[0]["input"] == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "Q0\nA. p\nB. q\nC. r\nD. s\nAnswer:"
    )  # the first lines of qlora's zero_shot_mmlu_val.json have this form
    assert [row["output"] for row in zero] == ["A", "B", "C"]
    two = mmlu.prompts_of(placed(rows), shots=2)
    assert len(two) == 1 and two[0]["output"] == "C"
    assert two[0]["input"].endswith(
        "\n\nQ0\nA. p\nB. q\nC. r\nD. s\nAnswer: A"
        "\n\nQ1\nA. p\nB. q\nC. r\nD. s\nAnswer: B"
        "\n\nQ2\nA. p\nB. q\nC. r\nD. s\nAnswer:"
    )
    with pytest.raises(UserError, match="5 solved examples .* there are 3 of the subject 'abstract_algebra'"):
        mmlu.prompts_of(placed(rows), shots=5, examples=placed(rows))


# --- multiple choice ------------------------------------------------------------------------------------------------

ARC = {"question": "Why?", "choices": {"text": ["x", "yy", "zzz"], "label": ["A", "B", "C"]}, "answerKey": "C"}
HELLASWAG = {"activity_label": "Golf", "ctx_a": "A man swings.", "ctx_b": "then he", "ctx": "A man swings. then he",
             "endings": ["runs [step] off.", "sleeps.", "eats.", "sings."], "label": "2"}  # fmt: skip
TRUTHFULQA = {"question": "Who?", "mc1_targets": {"choices": ["I", "you"], "labels": [1, 0]}}


@pytest.mark.parametrize(
    ("row", "stem", "answer"),
    [
        (ARC, "Question: Why?\nAnswer:", 2),
        (
            {**ARC, "choices": {"text": ["x", "yy"], "label": ["1", "2"]}, "answerKey": "2"},
            "Question: Why?\nAnswer:",
            1,
        ),
        (HELLASWAG, "Golf: A man swings. Then he", 2),
        ({"ctx": "A man.", "endings": ["a", "b"], "activity_label": "Golf", "expected_index": 1}, "Golf: A man.", 1),
        (TRUTHFULQA, "Q: Who?\nA:", 0),
        (
            {"question": "Who?", "choices": ["I", "you"], "expected_index": 1, "source": "truthfulqa-mc1"},
            "Q: Who?\nA:",
            1,
        ),
        ({"question": "Q", "choices": ["p", "q"], "answer": "B"}, "Question: Q\nAnswer:", 1),
        ({"query": "as it is", "choices": ["p", "q"], "gold": 0}, "as it is", 0),
        ({"question": "Q", "options": ["p", "q"], "answer": "q"}, "Question: Q\nAnswer:", 1),
    ],
)
def test_forms_of_questions(row, stem, answer):
    (question,) = read_questions(placed([row]))
    assert (question.stem, question.answer) == (stem, answer)
    assert all("[" not in choice for choice in question.choices)


def test_the_prompts_are_the_harnesss():
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed")
    import pathlib

    import jinja2
    import yaml

    folder = pathlib.Path(tasks.__file__).parent

    def template(file):
        text = (folder / file).read_text().replace("!function", "")
        return jinja2.Template(yaml.safe_load(text)["doc_to_text"])

    arc, _, truthful = read_questions(placed([ARC, HELLASWAG, TRUTHFULQA]))
    assert template("arc/arc_easy.yaml").render(**ARC) == arc.stem
    assert template("truthfulqa/truthfulqa_mc1.yaml").render(**TRUTHFULQA) == with_shots(
        truthful.primer, [], truthful.stem
    )
    assert exact_match._stem("How many?") == template("gsm8k/gsm8k.yaml").render(question="How many?")
    from lm_eval.tasks.hellaswag.utils import process_docs

    class Docs(list):
        def map(self, made):
            return [made(row) for row in self]

    (theirs,) = process_docs(Docs([HELLASWAG]))
    (ours,) = read_questions(placed([HELLASWAG]))
    assert (ours.stem, list(ours.choices), ours.answer) == (theirs["query"], theirs["choices"], theirs["gold"])


def test_each_choice_is_scored_as_its_question_goes_on(tiny):
    rows = [{"question": f"What is {n}?", "choices": ["one", "two and a half", "ü"], "answer": n % 3} for n in range(5)]
    found = by_likelihood(tiny, read_questions(placed(rows)), shots=1)
    right = {"acc": [], "acc_norm": [], "acc_bytes": []}
    shot = "Question: What is 0?\nAnswer: one\n\n"
    for row, prediction in zip(rows[1:], found.predictions, strict=True):
        scores = []
        for choice in row["choices"]:
            context = list(f"{shot}Question: {row['question']}\nAnswer:".encode())  # a token a byte
            ids = [*context, *f" {choice}".encode()]
            logs = log_softmax(padded_logits(tiny, ids))[len(context) - 1 : -1]
            scores.append(logs[np.arange(len(logs)), ids[len(context) :]].sum())
        np.testing.assert_allclose(prediction["log_likelihoods"], scores, rtol=1e-5)
        for name, sizes in (("acc", [1, 1, 1]), ("acc_norm", [3, 14, 1]), ("acc_bytes", [3, 14, 2])):
            right[name].append(int(np.argmax(np.array(scores) / sizes)) == row["answer"])
        assert (
            prediction["prediction"] == row["choices"][int(np.argmax(scores))]
            and prediction["question"] == row["question"]
        )
    assert {name: found.figures[name] for name in right} == {name: np.mean(values) for name, values in right.items()}
    assert found.figures["questions"] == 4


def test_letters_are_the_logits_at_the_last_place(tiny):
    rows = [{"question": f"What is {n}?", "choices": ["p", "q", "r"][: 2 + n % 2], "answer": n % 2} for n in range(4)]
    found = by_letter(tiny, read_questions(placed(rows)), shots=1)
    assert found.figures["questions"] == 3 and not found.figures["shuffled"]
    for row, prediction in zip(rows[1:], found.predictions, strict=True):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABC", row["choices"], strict=False))
        text = f"What is 0?\nA. p\nB. q\nAnswer: A\n\n{row['question']}\n{listed}\nAnswer: "
        logits = padded_logits(tiny, list(text.encode()))[-1]  # a token a byte, so the blank stands before every letter
        guess = int(np.argmax([logits[ord(letter)] for letter in "ABC"[: len(row["choices"])]]))
        assert (prediction["letter"], prediction["correct"]) == ("ABC"[guess], guess == row["answer"])


def test_right_answers_that_all_stand_first_are_shuffled(tiny):
    rows = [{"question": "Who?", "choices": ["right", "no", "nor this"], "expected_index": 0} for _ in range(12)]
    found = by_letter(tiny, read_questions(placed(rows)))
    again = by_letter(tiny, read_questions(placed(rows)))
    other = by_letter(tiny, read_questions(placed(rows)), seed=1)
    assert found.figures["shuffled"] and found.predictions == again.predictions != other.predictions
    assert {row["prediction"] for row in found.predictions} != {"right"}
    assert all(row["correct"] == (row["prediction"] == "right") for row in found.predictions)


def test_letters_of_a_real_tokenizer(smollm2_gguf, npm_tokenizer):
    import transformers

    from tpu_tune.checkpoints.source import open_source

    smol = open_source(str(smollm2_gguf)).load_tokenizer()
    assert letter_tokens(smol, 4) == ([smol.convert_tokens_to_ids(f"Ġ{letter}") for letter in "ABCD"], [])
    llama = transformers.AutoTokenizer.from_pretrained(npm_tokenizer("llama2"))
    assert letter_tokens(llama, 4) == ([llama.convert_tokens_to_ids(f"▁{letter}") for letter in "ABCD"], [])


# --- exact match ----------------------------------------------------------------------------------------------------

ANSWERS = [
    ("so #### 18", "it is 9 * 2 = 18\n#### 18", True, True),
    ("#### $1,000", "#### 1000", False, True),  # the pattern takes no dollar sign
    ("#### 1,000.", "#### 1000", True, True),
    ("the answer is 18.", "#### 18", False, True),
    ("18 apples, then 4", "18", False, False),
    ("#### -3", "-3", True, True),
    ("", "7", False, False),
    ("no number", "#### 7", False, False),
    ("$12.50 in all", "#### 12.50", False, True),
]


@pytest.mark.parametrize(("answer", "right", "strict", "flexible"), ANSWERS)
def test_numbers_are_found_in_answers(answer, right, strict, flexible):
    assert (exact_match.strict(answer, right), exact_match.flexible(answer, right)) == (strict, flexible)


def test_numbers_are_found_as_the_harness_finds_them():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    ours = {"strict": exact_match.strict, "flexible": exact_match.flexible}
    filters = {
        "strict": RegexFilter(r"#### (\-?[0-9\.\,]+)"),
        "flexible": RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    for answer, right, *_ in [*ANSWERS, ("a 1 2.", "2", 0, 0), ("#### 5 #### 6", "#### 6", 0, 0), ("x,.", "1", 0, 0)]:
        for name, found in filters.items():
            extracted = list(found.apply([[answer]], [{}]))[0][0]
            score = exact_match_hf_evaluate(
                [extracted], [right], [",", r"\$", r"(?s).*#### ", r"\.$"], ignore_case=True
            )["exact_match"]
            assert ours[name](answer, right) == bool(score), (name, answer, right)


def test_answers_are_generated_and_written_as_qlora_writes_them(tiny, tmp_path, capsys):
    texts = ["one", "a longer question than that", "two"]
    prompts = [f"Question: {text}\nAnswer:" for text in texts]
    from tpu_tune.inference import Sampling

    said = [exact_match.until(text, exact_match.STOPS) for text in tiny.generate(prompts, Sampling(6), chat=False)]
    rows = [{"input": text, "output": answer, "id": text} for text, answer in zip(texts, said, strict=True)]
    rows[1]["output"] = "something else"
    words = ("--model", tiny.source.path, "--task", "exact-match", "--max-new-tokens", 6, "--output", tmp_path / "out")
    found = evaluated(capsys, *words, "--data", write(tmp_path / "asked.jsonl", rows))
    assert found["exact_match"] == pytest.approx(2 / 3) and found["questions"] == 3
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    for line, row, prompt, answer in zip(lines, rows, prompts, said, strict=True):
        assert {key: line[key] for key in row} == row
        assert line["prediction"] == answer.strip()
        assert line["prediction_with_input"] == (prompt + answer).strip()
    assert [line["correct"] for line in lines] == [True, False, True]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.jsonl", "results.json"]


def test_gsm8ks_rows_are_read(questions):
    asked = exact_match.read_asked(read_task_rows(str(questions("gsm8k"))))
    assert len(asked) == 100 and asked[0][1] == "18" and asked[0][0].startswith("Melanie")


# --- perplexity, and evaluation alone -------------------------------------------------------------------------------


def test_a_run_is_evaluated_as_training_evaluates(run, capsys, caplog):
    config = json.loads((run / "config.json").read_text())
    found = evaluated(capsys, "--model", run, "--base")
    lines = [record.getMessage() for record in caplog.records if "of them targets" in record.getMessage()]
    assert lines and len(set(lines)) == len(lines)  # the rows are the same for both models, and told once
    config["output_dir"] = str(run / "none")  # else the result there would be evaluated
    config["model"]["adapter"] = str(run / "adapter")
    expected = evaluate_only(config)
    for name in ("eval_loss", "eval_perplexity", "eval_token_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["eval_num_tokens"] == expected["eval_num_tokens"] > 50
    config["model"]["adapter"] = ""
    before = evaluate_only(config)
    assert found["against"]["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    difference = found["difference"]["eval_loss"]
    assert difference["value"] == pytest.approx(expected["eval_loss"] - before["eval_loss"], rel=1e-3)
    assert difference["low"] < difference["value"] < difference["high"]
    assert found["intervals"]["eval_loss"][0] < found["eval_loss"] < found["intervals"]["eval_loss"][1]


def test_evaluation_alone_by_a_config_file(run, tmp_path, capsys):
    values = json.loads((run / "config.json").read_text())
    file = tmp_path / "config.py"
    file.write_text(
        "import json\nfrom tpu_tune import config\n\n"
        f"def get_config():\n    return config.from_dict(json.loads({json.dumps(values)!r}))\n"
    )
    out = tmp_path / "never"
    words = ("--config", file, f"--config.output_dir={out}", f"--config.data.eval={values['data']['train']}")
    both = evaluated(capsys, *words)
    only = evaluated(capsys, *words, "--config.data.train=")
    assert both["eval_loss"] == only["eval_loss"] and both["eval_num_tokens"] == only["eval_num_tokens"]
    assert not out.exists()
    half = evaluated(capsys, *words, "--dtype", "float16")
    assert half["eval_loss"] != both["eval_loss"] and abs(half["eval_loss"] - both["eval_loss"]) < 1e-2


def test_bits_per_byte_of_text(tiny, tmp_path, capsys):
    texts = ["a text of some words", "another, with ü in it", "x" * 150]
    file = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    words = (
        "--model",
        tiny.source.path,
        "--data",
        file,
        f"--config.data.cache_dir={tmp_path}",
        "--config.data.num_workers=1",
    )
    found = evaluated(capsys, *words)
    nats = count = 0
    for text in texts:  # a token a byte, and EOS behind it; the first has nothing before it
        ids = [*text.encode(), 256]
        nats -= log_softmax(padded_logits(tiny, ids))[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    assert found["eval_loss"] == pytest.approx(nats / count, rel=1e-5) and found["eval_num_tokens"] == count
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-5)
    cut = evaluated(capsys, *words, "--limit", 2)
    assert cut["eval_num_tokens"] == sum(len(text.encode()) for text in texts[:2])


# --- intervals ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_is_scipys(right_of):
    right, count = right_of
    expected = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(right, count), (expected.low, expected.high), atol=1e-12)


def test_the_bootstraps_are_the_normal_ones_of_many_questions():
    random = np.random.default_rng(0)
    ours = random.random(3000) < 0.5
    theirs = np.where(random.random(3000) < 0.8, ours, random.random(3000) < 0.4)
    a, b = Measure.share("acc", ours), Measure.share("acc", theirs)
    found = compare(a, b)
    half = 1.96 * np.std(ours.astype(float) - theirs) / math.sqrt(3000)
    assert found.value == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    loss = Measure.ratio("eval_loss", random.random(3000), np.ones(3000))
    spread = interval(loss)
    assert spread.high - spread.low == pytest.approx(2 * 1.96 * np.std(loss.terms) / math.sqrt(3000), rel=0.1)


def test_a_mean_over_subjects_is_resampled_within_each():
    measure = Measure.share("acc", [1, 1, 1, 0, 0], groups=[0, 0, 0, 1, 1])
    found = interval(measure)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)  # each subject is of one mind


@settings(max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_laws_of_a_comparison(pairs):
    a, b = (Measure.share("acc", [pair[i] for pair in pairs]) for i in range(2))
    there, back, same = compare(a, b), compare(b, a), compare(a, a)
    np.testing.assert_allclose((there.value, there.low, there.high), (-back.value, -back.high, -back.low), atol=1e-12)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert there.low <= there.value + 1e-9 and there.value - 1e-9 <= there.high


def test_only_the_same_questions_are_compared():
    with pytest.raises(UserError, match="3 rows of one model against 2"):
        compare(Measure.share("acc", [1, 0, 1]), Measure.share("acc", [1, 0]))


# --- the command ----------------------------------------------------------------------------------------------------


def test_two_models_side_by_side_as_a_table(tiny_dir, tmp_path, capsys):
    rows = [{"question": f"What is {n}?", "choices": ["one", "two", "three"], "answer": n % 3} for n in range(6)]
    other = write_tiny_llama(tmp_path / "other", seed=1)
    words = ["--model", tiny_dir, "--against", other, "--task", "multiple-choice", "--output", tmp_path / "out"]
    words += ["--data", write(tmp_path / "asked.jsonl", rows)]
    assert main(["eval", *map(str, words)]) == 0
    text = capsys.readouterr().out
    assert "6 questions" in text and str(other) in text and "Wilson" in text and "paired bootstrap" in text
    line = next(line for line in text.splitlines() if line.startswith("acc_norm"))
    assert line.count("[") == 3 and "%" in line
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    for name, side in (("predictions.jsonl", report), ("predictions_against.jsonl", report["against"])):
        written = [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        assert np.mean([row["correct"] for row in written]) == pytest.approx(side["acc"])
    assert report["difference"]["acc"]["value"] == pytest.approx(report["acc"] - report["against"]["acc"])


GOOD = {"question": "Why?", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        ("multiple-choice", [GOOD, {"question": "Why?", "choices": ["a", "b"]}], "row 2: no answer"),
        ("multiple-choice", [GOOD, {**GOOD, "answer": 2}], "row 2: 'answer' is '2', which is none of the 2 choices"),
        ("multiple-choice", [{**GOOD, "answer": -1}], "row 1: 'answer' is '-1'"),
        ("multiple-choice", [{**GOOD, "answer": ""}], "row 1: 'answer' is empty"),
        ("multiple-choice", [{**ARC, "answerKey": "D"}], "row 1: 'answerKey' is 'D'"),
        ("multiple-choice", [{"question": "Why?", "answer": 0}], "row 1: no choices"),
        ("multiple-choice", [{**GOOD, "choices": ["a"]}], "row 1: 1 choices"),
        ("multiple-choice", [{**GOOD, "choices": ["a", " "]}], "row 1: 2 choices, of which none may be empty"),
        ("multiple-choice", [{"choices": ["a", "b"], "answer": 0}], "row 1: no question"),
        (
            "multiple-choice",
            [{"question": "?", "mc1_targets": {"choices": ["a", "b"], "labels": [0, 0]}}],
            "no right answer",
        ),
        ("multiple-choice", [], "the file is empty"),
        ("exact-match", [{"question": "Why?"}], "row 1: no answer"),
        ("exact-match", [{"answer": "so"}], "row 1: no question"),
        ("mmlu", [{"input": "Why?"}], "row 1: no 'output'"),
        ("mmlu", [{"input": "Why?", "output": "E"}], "row 1: the answer is 'E'; it must be one of A, B, C, D"),
        ("mmlu", [GOOD], "row 1: 2 choices, and MMLU's questions have 4"),
    ],
)
def test_bad_rows_are_told_in_one_line_before_any_model_is_read(task, rows, said, tmp_path, capsys):
    file = write(tmp_path / "bad.jsonl", rows)
    assert main(["eval", "--model", str(tmp_path / "none"), "--task", task, "--data", file]) == 1
    error = capsys.readouterr().err.strip()
    assert said in error and "bad.jsonl" in error and "\n" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--model"),
        (["--task", "mmlu", "--data", "x"], "--model"),
        (["--model", "x", "--task", "mmlu"], "--data"),
        (["--model", "x", "--task", "mmlu", "--data", "no.jsonl"], "no such file"),
        (["--model", "x", "--task", "mmlu", "--data", "no.jsonl", "--config.seed=1"], "takes neither"),
        (["--model", "x", "--split", "val", "--data", "no.jsonl"], "--split"),
        (["--model", "x"], "--data"),
    ],
)
def test_what_is_missing_or_senseless(words, said, capsys):
    assert main(["eval", *words]) == 1
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_fewer_than_no_shots(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--model", "x", "--task", "mmlu", "--data", "x", "--shots", "-1"])
    assert "argument --shots: -1 is out of range" in capsys.readouterr().err


def test_a_base_is_a_runs_and_a_run_must_have_ended(tiny_dir, run, tmp_path, capsys):
    file = write(tmp_path / "asked.jsonl", [GOOD])
    words = ["--task", "multiple-choice", "--data", file]
    assert main(["eval", "--model", str(tiny_dir), "--base", *words]) == 1
    assert "is no run directory" in capsys.readouterr().err
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text((run / "config.json").read_text())
    assert main(["eval", "--model", str(begun), *words]) == 1
    assert "has no adapter/ yet" in capsys.readouterr().err


def test_letters_that_are_no_single_tokens(tiny):
    class Joined:
        bos_token = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [hash(text) % 1000]}

    with pytest.raises(UserError, match="one token each"):
        letter_tokens(Joined(), 4)
    rows = [{"question": "?", "choices": [f"c{n}" for n in range(30)], "answer": n} for n in range(2)]
    with pytest.raises(UserError, match="30 choices, and there are 26 letters"):
        by_letter(tiny, read_questions(placed(rows)))


def test_rows_of_a_split(tmp_path, monkeypatch):
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}.jsonl", [{"of": name}] * 3)
    found = {split: read_task_rows(str(tmp_path), split)[0][1]["of"] for split in ("", "val", "test", "train")}
    assert found == {"": "validation", "val": "validation", "test": "test", "train": "train"}
    assert len(read_task_rows(str(tmp_path), limit=2)) == 2
    with pytest.raises(UserError, match="no file of the split 'dev'"):
        read_task_rows(str(tmp_path), "dev")
    import datasets

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: [{"of": (name, subset, split)}])
    assert read_task_rows("cais/mmlu", "val", "all") == [
        ("cais/mmlu, row 1", {"of": ("cais/mmlu", "all", "validation")})
    ]


def test_the_primer_is_six_questions():
    assert TRUTHFULQA_PRIMER.count("Q: ") == TRUTHFULQA_PRIMER.count("A: ") == 6
