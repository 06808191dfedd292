"""Log-likelihoods against the formula over full logits, against torch on SmolLM2, and under lm-evaluation-harness."""

import json
import pathlib

import numpy as np
import pytest
import tiny_models
from helpers_eval import log_softmax, padded_logits, write_run
from helpers_training import write_tiny_llama

import tpu_tune
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.errors import UserError
from tpu_tune.inference import scoring
from tpu_tune.inference.run_model import load_any
from tpu_tune.training.tasks.multiple_choice import by_likelihood
from tpu_tune.training.tasks.questions import read_questions
from tpu_tune.training.tasks.task_rows import read_task_rows

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "eval_smollm2.json"  # by `python tests/make_goldens.py FILE.gguf`


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tiny(tiny_dir):
    return tpu_tune.load(str(tiny_dir))


def by_hand(model, context, continuation):
    """(log-likelihood, greedy, right guesses) of token ids, from the whole row's logits."""
    ids = [*context, *continuation]
    logs = log_softmax(padded_logits(model, ids))[len(context) - 1 : -1]
    right = logs.argmax(-1) == np.asarray(continuation)
    return logs[np.arange(len(continuation)), continuation].sum(), right.all(), right.sum()


def test_scores_are_the_formula_for_rows_of_any_length(tiny):
    random = np.random.default_rng(0)
    pairs = [
        (random.integers(0, 256, before).tolist(), random.integers(0, 256, after).tolist())
        for before, after in ((1, 1), (3, 40), (40, 3), (100, 90), (1, 31), (90, 92))
    ]
    rows = [scoring.continuation_row(tiny, *pair) for pair in pairs]
    found = scoring.score(tiny, rows, tokens=[5, 250], batch_tokens=128)
    expected = [by_hand(tiny, *pair) for pair in pairs]
    np.testing.assert_allclose(found.log_likelihood, [value for value, _, _ in expected], rtol=2e-6)
    assert found.num_right.tolist() == [right for _, _, right in expected]
    assert found.num_targets.tolist() == [len(after) for _, after in pairs]
    logits = [padded_logits(tiny, [*before, *after])[len(before) - 1, [5, 250]] for before, after in pairs]
    np.testing.assert_allclose(found.first_logits, logits, rtol=1e-5, atol=1e-5)


def test_what_greedy_decoding_writes_is_greedy(tiny):
    prompt, answer = [5, 9, 3], []
    for _ in range(6):
        answer.append(int(padded_logits(tiny, [*prompt, *answer])[-1].argmax()))
    other = [*answer[:-1], (answer[-1] + 1) % 256]
    rows = [scoring.continuation_row(tiny, prompt, ids) for ids in (answer, other)]
    found = scoring.score(tiny, rows)
    assert found.is_greedy.tolist() == [True, False] and found.num_right.tolist() == [6, 5]


def test_an_encoder_decoder_reads_the_context_in_its_encoder():
    arch, params = tiny_models.load(tiny_models.CONFIGS["t5"])
    from tpu_tune.inference.model import Model

    model = Model(arch, params, np.dtype("float32"), None)
    context, answer = [[3, 4, 5], [7] * 40], [[8, 9], [10, 11, 12]]
    found = scoring.score(model, [scoring.continuation_row(model, *pair) for pair in zip(context, answer, strict=True)])
    before, after = context[0], answer[0]  # the shorter one, which is padded
    logs = log_softmax(np.asarray(model([before], [[arch.start_token, *after[:-1]]]))[0])
    np.testing.assert_allclose(found.log_likelihood[0], logs[np.arange(len(after)), after].sum(), rtol=1e-5)


def test_too_long_a_context_loses_its_beginning(tiny):
    ids = np.random.default_rng(1).integers(0, 256, 300).tolist()
    row = scoring.continuation_row(tiny, ids[:290], ids[290:])
    assert row.ids == ids[300 - 257 : -1] and list(row.targets)[-10:] == ids[290:]
    assert list(row.targets[:-10]) == [scoring.IGNORED] * 246


@pytest.mark.parametrize("length", [1, 5, 255, 256, 257, 512, 700])
def test_rolling_windows_score_each_token_once(tiny, length):
    ids = np.random.default_rng(length).integers(0, 256, length).tolist()
    rows = scoring.rolling_rows(tiny, ids)
    predicted = [target for row in rows for target in row.targets if target != scoring.IGNORED]
    assert predicted == ids and all(len(row.ids) <= 256 for row in rows)
    assert rows[0].ids[0] == tiny.tokenizer.bos_token_id and all(len(row.ids) == 256 for row in rows[1:])
    for row in rows:  # what is read is what stands before what is predicted
        for here, (target, following) in enumerate(zip(row.targets, [*row.ids[1:], None], strict=True)):
            assert target == scoring.IGNORED or following is None or target == following, here


def test_no_text_at_all(tiny):
    assert scoring.rolling_rows(tiny, []) == [] and len(scoring.score(tiny, []).log_likelihood) == 0
    with pytest.raises(UserError, match="no token"):
        scoring.score_continuations(tiny, [("a", "")])
    with pytest.raises(UserError, match="text 1 to score"):
        scoring.score(tiny, [scoring.Row([1, 2], [scoring.IGNORED] * 2)])


# --- lm-evaluation-harness ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness_tasks(tmp_path_factory):
    """A task manager of the harness with three local tasks: choices, a rolling likelihood, generation."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {
            "question": f"What is {n} and {n * n}?",
            "choices": ["one", "two and", "three ", "a longer one"],
            "answer": n % 4,
        }
        for n in range(6)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\n  cache_dir: {folder}\n"
    start += 'test_split: test\ndoc_to_text: "{{question}}\\nAnswer:"\n'
    metric = "  - metric: {0}\n    aggregation: {1}\n    higher_is_better: true\n"
    (folder / "choices.yaml").write_text(
        f"task: tiny_choices\n{start}output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list:\n" + "".join(metric.format(name, "mean") for name in ("acc", "acc_norm", "acc_bytes"))
    )
    (folder / "rolling.yaml").write_text(
        f"task: tiny_rolling\n{start.replace('{{question}}', '')}output_type: loglikelihood_rolling\n"
        'doc_to_target: "{{question * 20}}"\nmetric_list:\n' + metric.format("bits_per_byte", "bits_per_byte")
    )
    (folder / "answers.yaml").write_text(
        f'task: tiny_answers\n{start}output_type: generate_until\ndoc_to_target: "x"\n'
        "generation_kwargs:\n  until: [q]\n  max_gen_toks: 12\n  do_sample: false\n"
        "metric_list:\n" + metric.format("exact_match", "mean")
    )
    return TaskManager(include_path=str(folder), include_defaults=False)


def harness(manager, model, **arguments):
    import lm_eval

    import tpu_tune.inference.harness  # noqa: F401

    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    return lm_eval.simple_evaluate(
        model=model,
        model_args=text,
        tasks=["tiny_choices", "tiny_rolling", "tiny_answers"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )


def test_the_harness_finds_what_it_finds_of_torch(harness_tasks, tiny_dir):
    pytest.importorskip("torch")
    pytest.importorskip("accelerate", reason="the harness's own class needs it")
    ours = harness(harness_tasks, "tpu_tune", pretrained=tiny_dir)
    theirs = harness(harness_tasks, "hf", pretrained=tiny_dir, dtype="float32", device="cpu")
    for task in ("tiny_choices", "tiny_answers"):
        assert ours["results"][task] == theirs["results"][task]
    for task in ("tiny_choices", "tiny_rolling", "tiny_answers"):
        pairs = list(zip(ours["samples"][task], theirs["samples"][task], strict=True))
        assert len(pairs) == 6
        for mine, other in pairs:
            if task == "tiny_answers":
                assert mine["resps"] == other["resps"] and mine["resps"][0][0]
            else:
                np.testing.assert_allclose(np.float64(mine["resps"]), np.float64(other["resps"]), rtol=3e-6)


def test_a_run_directory_under_the_harness(harness_tasks, tiny_dir, tmp_path):
    from lm_eval.api.instance import Instance

    from tpu_tune.inference.harness import TpuTuneLM

    run = write_run(tiny_dir, tmp_path)
    assert RunDirectory(run).exists() and not RunDirectory(tiny_dir).exists()
    pairs = [("a tiny model", " reads"), ("", "words come")]
    found = TpuTuneLM(pretrained=str(run), batch_size="auto").loglikelihood(
        [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    )
    trained = load_any(str(run))
    assert trained.targets is not None and trained.dtype == "float32"
    np.testing.assert_allclose(
        [value for value, _ in found], scoring.score_continuations(trained, pairs).log_likelihood
    )
    before = scoring.score_continuations(load_any(str(run), before=True), pairs).log_likelihood
    assert np.all(np.abs(before - [value for value, _ in found]) > 1e-3)


# --- a real model on real questions ---------------------------------------------------------------------------------


def of_file(questions, name, limit=0):
    return read_questions(read_task_rows(str(questions(name)), limit=limit))


def test_smollm2_scores_hellaswag_as_torch_did(smollm2_gguf, questions):
    golden = json.loads(GOLDEN.read_text())
    asked = of_file(questions, "hellaswag", len(golden["log_likelihoods"]))
    found = by_likelihood(tpu_tune.load(str(smollm2_gguf)), asked)
    for row, expected in zip(found.predictions, golden["log_likelihoods"], strict=True):
        np.testing.assert_allclose(row["log_likelihoods"], expected, rtol=1e-4)
    assert {name: found.figures[name] for name in golden["figures"]} == golden["figures"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hellaswag", "truthfulqa"])
def test_accuracies_on_100_questions_equal_torch(name, smollm2_gguf, questions):
    pytest.importorskip("torch")
    import make_goldens

    asked = of_file(questions, name)
    model = tpu_tune.load(str(smollm2_gguf))
    found = by_likelihood(model, asked)
    scores, figures = make_goldens.torch_multiple_choice(
        make_goldens.torch_smollm2(smollm2_gguf), model.tokenizer, asked
    )
    print(name, figures, found.figures)
    for row, expected in zip(found.predictions, scores, strict=True):
        np.testing.assert_allclose(row["log_likelihoods"], expected, rtol=1e-4)
    assert {key: found.figures[key] for key in figures} == figures and len(asked) == 100
