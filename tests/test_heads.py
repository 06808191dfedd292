"""Heads that judge a text, against transformers' ForSequenceClassification and peft's SEQ_CLS in torch."""

from __future__ import annotations

import json

import helpers_training as helpers
import jax
import jax.numpy as jnp
import make_reward_golden
import numpy as np
import pytest
import sklearn.metrics
import tiny_models

import tpu_tune
from tpu_tune.checkpoints import heads, peft
from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.source import open_source
from tpu_tune.cli import main
from tpu_tune.cli.hf import command_line
from tpu_tune.cli.hf.translate import translate
from tpu_tune.data.labels import MULTI, REGRESSION, SINGLE, Labels, find_labels, labelled
from tpu_tune.data.loading import PackedRows
from tpu_tune.data.messages import RowError
from tpu_tune.data.packing import one_per_row, pack
from tpu_tune.data.tokenized_set import TokenizedSet
from tpu_tune.errors import UserError
from tpu_tune.inference.card import CardFacts, model_card
from tpu_tune.inference.public_names import Base
from tpu_tune.models import FAMILIES, Execution, architecture, classifier_config
from tpu_tune.planning.model_config import model_config
from tpu_tune.training.evaluate_only import evaluate_only
from tpu_tune.training.head_objectives import Classification
from tpu_tune.training.loop import train
from tpu_tune.training.objectives import mean
from tpu_tune.training.step import ModelLoss
from tpu_tune.transforms import FULL, find_targets, merged_tensors

PAD = 0
LENGTHS = (7, 3, 12, 5, 9)
CLASSES = {SINGLE: 3, MULTI: 4, REGRESSION: 2}


def config_of(case: str, labels: int, problem: str) -> dict:
    """Return a tiny classifier's config.json."""
    plain = {**tiny_models.CONFIGS[case], "pad_token_id": PAD}
    return classifier_config(plain, [f"L{number}" for number in range(labels)], problem)


def examples(problem: str) -> TokenizedSet:
    """Return documents of ragged lengths with labels."""
    random = np.random.RandomState(3)
    tokens = random.randint(3, 96, sum(LENGTHS)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    count = CLASSES[problem]
    if problem == SINGLE:
        labels = random.randint(0, count, (len(LENGTHS), 1)).astype(np.int32)
    else:
        numbers = random.randn(len(LENGTHS), count)
        labels = (numbers > 0 if problem == MULTI else numbers).astype(np.float32)
    summary = {"truncated": 0, "split": 0}
    plain = TokenizedSet(tokens, np.ones(len(tokens), bool), offsets, np.arange(len(LENGTHS)), summary)
    return labelled(plain, dict(enumerate(labels)), PAD)


def packed(data: TokenizedSet, width: int = 24) -> dict[str, jnp.ndarray]:
    """Return all documents in packed rows, and an empty row."""
    rows = PackedRows(data, pack(data.lengths, width))
    return {name: jnp.asarray(array) for name, array in rows.take(np.array([*range(len(rows)), -1])).items()}


def torch_inputs(data: TokenizedSet, problem: str) -> dict:
    """Return the same documents as transformers takes them: one a row, padded on the right."""
    import torch

    rows = PackedRows(data, one_per_row(data.lengths, 64))
    taken = rows.take(np.arange(len(rows)))
    labels = data.labels[:, 0].astype(np.int64) if problem == SINGLE else data.labels
    return {
        "input_ids": torch.tensor(taken["input_ids"], dtype=torch.long),
        "attention_mask": torch.tensor((taken["segment_ids"] > 0).astype(np.int64)),
        "labels": torch.tensor(labels),
    }


def torch_classifier(directory: str):
    """Load a directory with torch transformers; nothing may be missing or left over."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def gradient(arch, method, problem: str):
    """Return the jitted loss and gradient of the mean loss."""
    model_loss = ModelLoss(arch, Execution(packed=True), method, Classification(problem))

    def loss(trainable, frozen, batch):
        total, sums = model_loss(trainable, frozen, batch, None)
        return total / model_loss.objective.weight(batch), sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def close(ours, theirs) -> None:
    """Hold two arrays against each other at 1e-4 of the largest entry."""
    theirs = np.asarray(theirs)
    assert np.max(np.abs(np.asarray(ours) - theirs)) <= 1e-4 * max(np.max(np.abs(theirs)), 1e-6)


@pytest.mark.parametrize(
    ("case", "problem"), [("llama2", SINGLE), ("gpt2", SINGLE), ("llama2", MULTI), ("llama2", REGRESSION)]
)
def test_loss_and_gradients_of_packed_rows_are_transformers(case, problem, tmp_path):
    config, data = config_of(case, CLASSES[problem], problem), examples(problem)
    torch_model = torch_classifier(tiny_models.write(tmp_path / "model", config))
    output = torch_model(**torch_inputs(data, problem))
    output.loss.backward()

    arch, params = tiny_models.load(config)
    (loss, sums), grads = gradient(arch, FULL, problem)(*FULL.split(params, {}), packed(data))
    assert float(loss) == pytest.approx(output.loss.item(), rel=1e-4)
    theirs = {name: leaf.grad for name, leaf in torch_model.named_parameters()}
    for name, ours in merged_tensors(grads, arch.modules()):
        close(ours, theirs.pop(name))
    assert not theirs
    logits = output.logits.detach().numpy()
    figures = {name: float(mean(*pair)) for name, pair in sums.items()}
    if problem == REGRESSION:
        assert figures["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(data.labels, logits), rel=1e-4)
        return
    true, guessed = (data.labels, logits > 0) if problem == MULTI else (data.labels[:, 0], logits.argmax(1))
    assert figures["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, guessed))
    assert figures["f1"] == pytest.approx(sklearn.metrics.f1_score(true, guessed, average="macro", zero_division=0))


def test_lora_gradients_are_pefts(tmp_path):
    import peft as torch_peft

    config, data = config_of("llama2", 3, SINGLE), examples(SINGLE)
    torch_model = torch_classifier(tiny_models.write(tmp_path / "model", config))
    names = ["q_proj", "down_proj"]
    torch_model = torch_peft.get_peft_model(
        torch_model, torch_peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=names)
    )
    for name, leaf in torch_model.named_parameters():
        if "lora_B" in name:
            leaf.data.normal_(0, 0.1)
    torch_model.save_pretrained(str(tmp_path / "adapter"))
    torch_model(**torch_inputs(data, SINGLE)).loss.backward()

    arch, params = tiny_models.load(config)
    spec, adapters = peft.read_adapter(str(tmp_path / "adapter"), arch)
    assert spec.modules_to_save == ["score"]  # PEFT writes "classifier" too, the head's name in other models
    targets = find_targets(arch.modules(), spec)
    trainable, frozen = targets.split(params, adapters)
    _, grads = gradient(arch, targets, SINGLE)(trainable, frozen, packed(data))
    theirs = {
        name.replace(".default", "").replace(".modules_to_save", ""): leaf.grad
        for name, leaf in torch_model.named_parameters()
        if leaf.requires_grad
    }
    ours = peft.adapter_tensors(grads, targets, arch)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        close(value, theirs[name])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in tiny_models.FAMILY_CASES if case not in ("t5",)])
def test_every_familys_classifier_has_transformers_logits(case, tmp_path):
    import torch

    try:
        config = config_of(case, 3, SINGLE)
    except UserError as error:
        assert "is not implemented" in str(error)
        return
    directory = tiny_models.write(tmp_path / "model", config)
    ids = torch_inputs(examples(SINGLE), SINGLE)
    with torch.no_grad():
        theirs = torch_classifier(directory)(**ids).logits
    close(tpu_tune.load(directory)(ids["input_ids"].numpy()), theirs)


# --- labels in rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "problem", "names"),
    [
        (["b", "a", "b"], SINGLE, ("a", "b")),
        ([0, 2, 1.0], SINGLE, ("LABEL_0", "LABEL_1", "LABEL_2")),
        (["0", "1"], SINGLE, ("LABEL_0", "LABEL_1")),
        ([5, 1, 3], SINGLE, ("1", "3", "5")),
        ([True, False], SINGLE, ("LABEL_0", "LABEL_1")),
        ([0.5, 2], REGRESSION, ("LABEL_0",)),
        ([["x", "y"], [], ["z"]], MULTI, ("x", "y", "z")),
        ([[0, 1.0], [1, 0]], MULTI, ("LABEL_0", "LABEL_1")),
        (["[0.5, -3]", "[1, 2]"], REGRESSION, ("LABEL_0", "LABEL_1")),
    ],
)
def test_labels_are_found_in_the_rows(values, problem, names):
    found = find_labels([{"text": "x", "label": value} for value in values])
    assert (found.problem_type, found.names) == (problem, names)
    for value in values:
        assert found.read({"label": value}).shape == ((1,) if problem == SINGLE else (len(names),))


def test_a_label_is_read_by_name_by_number_and_as_a_list():
    named = Labels(SINGLE, ("bad", "good"))
    assert [named.read({"label": value}).tolist() for value in ("good", 1, "1", 1.0)] == [[1]] * 4
    assert Labels(MULTI, ("x", "y", "z")).read({"labels": ["z", "x"]}).tolist() == [1, 0, 1]
    assert Labels(REGRESSION, ("LABEL_0",)).read({"label": "2.5"}).tolist() == [2.5]


@pytest.mark.parametrize(
    ("problem", "row", "said"),
    [
        (SINGLE, {"text": "x"}, "no 'label'"),
        (SINGLE, {"label": "goood"}, "did you mean 'good'"),
        (SINGLE, {"label": -1}, "none of the 2 labels"),
        (SINGLE, {"label": 2}, "none of the 2 labels"),
        (MULTI, {"labels": [1, 2]}, "must be in 0..1"),
        (MULTI, {"labels": [1]}, "must be 2 finite numbers"),
        (REGRESSION, {"labels": [1, float("inf")]}, "must be 2 finite numbers"),
    ],
)
def test_a_label_that_is_none_is_said(problem, row, said):
    with pytest.raises(RowError, match=said):
        Labels(problem, ("bad", "good")).read(row)


def test_a_text_that_ends_in_padding_is_read_before_it():
    plain = TokenizedSet(
        np.array([5, 6, 7, 8, PAD, PAD, 9], np.int32), np.ones(7, bool), np.array([0, 3, 6, 7]), np.array([0, 1, 1]),
        {"truncated": 0, "split": 1},
    )  # fmt: skip
    made = labelled(plain, {0: np.array([1], np.int32), 1: np.array([0], np.int32)}, PAD)
    # Of the second row, which was too long, the first part is kept.
    assert np.flatnonzero(made.loss_mask).tolist() == [2, 3]
    assert made.summary["truncated"] == 1 and len(made) == 2


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_whole_model_is_what_transformers_loads_and_training_starts_from(tmp_path):
    import torch

    base = open_source(str(helpers.write_tiny_llama(tmp_path / "base")))
    source = heads.with_head(base, ["no", "yes", "perhaps"], SINGLE)
    arch = open_architecture(source)
    assert source.new_head and not any("lm_head" in module.path for module in arch.modules())
    write_model(str(tmp_path / "model"), load_params(source, arch), source, arch)

    theirs = torch_classifier(str(tmp_path / "model"))
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    assert theirs.config.id2label == {0: "no", 1: "yes", 2: "perhaps"} and theirs.config.problem_type == SINGLE
    ours = tpu_tune.load(str(tmp_path / "model"))
    ids = np.array([[5, 6, 7, 256], [9, 8, 256, 256]])  # 256, the EOS, is padding: this tokenizer has no other
    with torch.no_grad():
        close(ours(ids), theirs(torch.tensor(ids)).logits)
    assert list(ours.classify(["It is."])[0]) == ["no", "yes", "perhaps"]
    assert sum(ours.classify(["It is."])[0].values()) == pytest.approx(1, abs=1e-5)

    again = heads.with_head(open_source(str(tmp_path / "model")), ["no", "yes", "perhaps"], SINGLE)
    assert not again.new_head
    np.testing.assert_array_equal(again.read("score.weight"), source.read("score.weight"))
    assert heads.with_head(again, ["a", "b"], SINGLE).new_head
    with pytest.raises(UserError, match="writes nothing"):
        ours.generate(["x"])
    with pytest.raises(UserError, match="has no words to predict"):
        heads.with_configured_head(again, helpers.make_config())


def test_families_without_a_classifier_in_transformers_are_refused():
    with pytest.raises(UserError, match="head on a 'cohere' model is not implemented"):
        classifier_config(tiny_models.CONFIGS["cohere"], ["a", "b"])
    with pytest.raises(UserError, match="encoder-decoder"):
        architecture({**tiny_models.CONFIGS["t5"], "architectures": ["T5ForSequenceClassification"]})


def test_the_known_classes_are_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as THEIRS

    for family in FAMILIES:
        try:
            ours = classifier_config({"model_type": family}, ["a", "b"])["architectures"][0]
        except UserError as error:
            assert f"head on a '{family}' model is not implemented" in str(error)
        else:
            assert ours == THEIRS[family]


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that learns which words a text has; (its configuration, the lines it printed)."""
    folder = tmp_path_factory.mktemp("heads")
    random = np.random.RandomState(0)
    words = {"good": ("fine", "great"), "bad": ("awful", "poor"), "odd": ("weird", "queer")}
    rows = []
    for _ in range(96):
        label = random.choice(list(words))
        rows.append({"text": f"it is {random.choice(words[label])}{'!' * random.randint(1, 9)}", "label": label})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = helpers.make_config(
        model__path=str(helpers.write_tiny_llama(folder / "base")), output_dir=str(folder / "run"),
        head__name="classification", data__train=str(folder / "rows.jsonl"), data__max_length=64, data__eval_ratio=0.25,
        data__cache_dir=str(folder / "cache"), model__dtype="float32", train__max_steps=30, train__eval_steps=30,
        train__learning_rate=0.02, train__per_device_train_batch_size=1, train__per_device_eval_batch_size=1,
    )  # fmt: skip
    said: list[str] = []
    train(config, say=said.append)
    return config, said


def test_a_run_learns_its_labels_and_says_so(run):
    config, said = run
    assert any("head: single label classification, 3 labels (bad, good, odd); it is new" in line for line in said)
    rows = helpers.metric_rows(config.output_dir)
    last = next(row for row in reversed(rows) if "eval_loss" in row)
    assert last["eval_accuracy"] > 0.9 and last["eval_f1"] > 0.9 and last["eval_num_documents"] == 24
    assert "eval_perplexity" not in last and "accuracy" in rows[0]
    stored = json.loads(open(config.output_dir + "/config.json").read())["head"]
    assert stored["labels"] == ["bad", "good", "odd"] and stored["problem_type"] == SINGLE
    again = evaluate_only(config, say=lambda line: None)
    assert again["eval_accuracy"] == last["eval_accuracy"]
    assert again["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_peft_reads_the_runs_adapter(run):
    import peft as torch_peft
    import torch
    from transformers import AutoModelForSequenceClassification

    config, _ = run
    adapter = config.output_dir + "/adapter"
    written = json.loads(open(adapter + "/adapter_config.json").read())
    assert written["task_type"] == "SEQ_CLS" and written["modules_to_save"] == ["score"]
    base = AutoModelForSequenceClassification.from_pretrained(
        config.model.path, num_labels=3, pad_token_id=256, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = torch_peft.PeftModel.from_pretrained(base, adapter).eval()
    ids = np.array([[5, 6, 7, 8], [9, 8, 256, 256]])
    ours = tpu_tune.load(config.model.path, adapter=adapter)
    with torch.no_grad():
        close(ours(ids), theirs(torch.tensor(ids)).logits)


def test_eval_of_a_run_counts_its_judgements(run, capsys, tmp_path):
    config, _ = run
    assert main(["eval", "--model", config.output_dir, "--json", "--output", str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["task"] == "classification" and figures["eval_num_documents"] == 24
    last = next(row for row in reversed(helpers.metric_rows(config.output_dir)) if "eval_loss" in row)
    for name in ("eval_loss", "eval_accuracy", "eval_f1"):
        assert figures[name] == pytest.approx(last[name], rel=1e-4)
    predictions = [json.loads(line) for line in open(tmp_path / "predictions.jsonl")]
    assert {row["predicted"] for row in predictions} <= {"bad", "good", "odd"}
    assert main(["eval", "--model", config.output_dir, "--task", "mmlu", "--data", str(tmp_path)]) != 0


def test_a_run_with_a_head_does_not_become_gguf_and_merges_into_a_classifier(run, capsys, tmp_path):
    config, _ = run
    output = str(tmp_path / "x.gguf")
    assert main(["export", config.output_dir, "--gguf", "--output", output]) != 0
    assert "GGUF" in capsys.readouterr().err
    assert main(["export", config.output_dir, "--merge", "--output", str(tmp_path / "merged")]) == 0
    merged = tpu_tune.load(str(tmp_path / "merged"))
    assert merged.labels == ["bad", "good", "odd"]
    found = merged.classify(["it is great!!"])[0]
    assert max(found, key=found.get) == "good"


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_reward_training_follows_trls_and_ends_in_a_model_that_transformers_loads(tmp_path, capsys):
    golden = json.loads(make_reward_golden.GOLDEN.read_text())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_reward_golden.reward_rows()))
    config = helpers.make_config(
        model__path=make_reward_golden.write_reward_model(tmp_path), output_dir=str(tmp_path / "run"), method="full",
        head__name="reward", head__center_rewards_coefficient=make_reward_golden.CENTERING, data__train=str(rows),
        data__eval=str(rows), data__max_length=128, data__cache_dir=str(tmp_path / "cache"), model__dtype="float32",
        train__max_steps=make_reward_golden.STEPS, train__learning_rate=make_reward_golden.RATE,
        train__lr_scheduler_type="constant", train__logging_steps=1, train__per_device_eval_batch_size=1,
        train__per_device_train_batch_size=1,
    )  # fmt: skip
    said: list[str] = []
    train(config, say=said.append)
    assert "head: reward" in said  # and not that it is new
    logged = [row for row in helpers.metric_rows(config.output_dir) if "loss" in row]
    for name, values in golden.items():
        np.testing.assert_allclose([row[name] for row in logged], values, rtol=2e-4, err_msg=name)

    assert main(["eval", "--model", config.output_dir, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["eval_accuracy"] == 1 and figures["eval_num_pairs"] == 4
    import torch

    theirs, ours = torch_classifier(config.output_dir + "/model"), tpu_tune.load(config.output_dir + "/model")
    ids = np.array([[5, 6, 7, 256], [9, 8, 256, 256]])
    with torch.no_grad():
        close(ours(ids), theirs(torch.tensor(ids)).logits)
    assert theirs.config.num_labels == 1 and list(ours.classify(["A fine day."])[0]) == ["reward"]


# --- commands that know of heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "name", "labels"),
    [
        (["--task_type", "SEQ_CLS", "--num_labels", "3"], "classification", 3),
        (["--problem_type", "regression"], "classification", 0),
        (["--center_rewards_coefficient", "0.01"], "reward", 0),
        (["--stage", "rm"], "reward", 0),
        (["--task_type", "CAUSAL_LM"], "lm", 0),
    ],
)
def test_other_scripts_flags_name_the_head(flags, name, labels):
    words = ["--model_name_or_path", "m", "--train_file", "rows.jsonl", "--output_dir", "out", *flags]
    config = translate(command_line.parse(words), lambda: "cpu", {}).config
    assert (config.head.name, config.head.num_labels) == (name, labels)


def test_the_card_tells_the_hub_and_the_reader_of_the_head(run):
    config = RunDirectory(run[0].output_dir).config()
    facts = CardFacts(
        "me/x", "adapter", config, config.output_dir, Base("b", "org/b", "hub"), helpers.metric_rows(config.output_dir)
    )
    card = model_card(facts)
    assert "pipeline_tag: text-classification" in card and "| accuracy | F1 |" in card and "perplexity" not in card
    assert "AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, id2label={0: 'bad'" in card
    assert "model.classify(" in card and "generate" not in card


def test_a_plan_counts_a_head_and_not_the_vocabulary():
    config = helpers.make_config(model__path="llama-7b", head__name="classification", head__num_labels=5)
    arch = architecture(model_config(config))
    assert arch.num_labels == 5 and arch.leaf_shapes()["score.weight"] == (4096, 5)
    assert "lm_head.weight" not in arch.leaf_shapes()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"head__num_labels": 2}, "belongs to head.name=classification"),
        ({"head__name": "classification", "head__labels": ["a", "a"]}, "must differ"),
        ({"head__name": "classification", "objective__name": "dpo"}, "has its own loss"),
        ({"head__name": "reward", "train__sample_prompts": ["x"]}, "needs a model that writes"),
    ],
)
def test_settings_that_do_not_go_with_a_head_are_refused(keys, said):
    with pytest.raises(UserError, match=said):
        helpers.make_config(**keys)
