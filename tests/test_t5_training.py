"""T5 as its user meets it: losses against torch + PEFT, and one QLoRA run through the command line to its exports."""

from __future__ import annotations

import json
import pathlib
import re
import types
from typing import Any

import helpers_training as helpers
import jax
import numpy as np
import pytest
import tiny_models

import tpu_tune
from tpu_tune import config as configuration
from tpu_tune.checkpoints import peft as peft_files
from tpu_tune.cli import main
from tpu_tune.data import Batches, load_data
from tpu_tune.errors import UserError
from tpu_tune.models import architecture
from tpu_tune.training.opening import check_widths
from tpu_tune.transforms import LoraConfig, find_targets

ROOT = pathlib.Path(__file__).parents[1]
STEPS, ACCUMULATION, ROWS, WARMUP = 10, 2, 3, 2
WORDS = "a tiny model reads some words and then says what they are".split()


def write_model(directory: pathlib.Path, case: str) -> pathlib.Path:
    """Write a tiny random T5 with a tokenizer of T5's own class; return the directory."""
    from transformers import T5Tokenizer

    tiny_models.write(directory, {**tiny_models.CONFIGS[case], "architectures": ["T5ForConditionalGeneration"]})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((chr(97 + i), -4.0) for i in range(26))]
    T5Tokenizer(vocab=[*pieces, *((f"▁{word}", -3.0) for word in WORDS)], extra_ids=4).save_pretrained(directory)
    return directory


def write_rows(file: pathlib.Path, count: int, seed: int) -> list[dict[str, str]]:
    """Write rows of ragged lengths: the output is the input's first word, then some of its others."""
    random = np.random.RandomState(seed)
    rows = []
    for number in range(count):
        words = [str(word) for word in random.choice(WORDS, random.randint(1, 9))]
        rows.append({"input": "" if number == 3 else " ".join(words), "output": " ".join(words[: 1 + number % 4])})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def torch_sums(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[Any, int, int]:
    """Return (summed cross-entropy, right first guesses, targets) of rows, by Hugging Face's own collator and T5."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    features = [
        {**tokenizer(row["input"]), "labels": tokenizer(text_target=row["output"])["input_ids"]} for row in rows
    ]
    batch = DataCollatorForSeq2Seq(tokenizer, getattr(model, "base_model", model))(features)
    labels = batch["labels"].flatten()
    logits = model(**batch).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    real = labels != -100
    return loss, int((logits.argmax(-1) == labels)[real].sum()), int(real.sum())


@pytest.mark.parametrize(("method", "case", "rate"), [("lora", "t5_gated", 1e-2), ("full", "t5", 1e-3)])
@pytest.mark.filterwarnings("ignore")
def test_losses_follow_torch(tmp_path: pathlib.Path, method: str, case: str, rate: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

    path = write_model(tmp_path / "model", case)
    rows = write_rows(tmp_path / "rows.jsonl", 20, seed=0)  # 20 rows, 6 a step: the last window lacks four
    config = helpers.make_config(
        model__path=str(path),
        method=method,
        model__dtype="float32",
        lora__rank=4,
        lora__alpha=8.0,
        data__train=str(tmp_path / "rows.jsonl"),
        data__eval_ratio=0.0,
        data__cache_dir=str(tmp_path / "cache"),
        train__learning_rate=rate,
        train__lr_scheduler_type="cosine",
        train__warmup_steps=WARMUP,
        train__weight_decay=0.1,
        train__gradient_accumulation_steps=ACCUMULATION,
        train__per_device_train_batch_size=ROWS,
        mesh__fsdp=1,
    )
    tokenizer, initial = AutoTokenizer.from_pretrained(path), None
    model, steps = helpers.prepare(config, STEPS)
    if method == "lora":
        random = np.random.RandomState(3)
        initial = {
            name: (random.uniform(-0.2, 0.2, leaf.shape) * name.endswith("lora_A")).astype(np.float32)
            for name, leaf in sorted(model.trainable.items())
        }
        model, steps = helpers.prepare(config, STEPS, initial=initial)
    data = load_data(config, tokenizer, model.architecture.vocab_size, model.architecture.start_token)
    batches = Batches(data.train, ROWS, ACCUMULATION, 0)
    assert batches.steps_per_epoch == 4
    _, metrics = helpers.run_steps(model, steps, map(batches.batch, range(STEPS)))
    ours = [row["loss"] for row in metrics]
    assert ours[-1] < ours[0] - 0.3

    network = tiny_models.torch_model(path)
    if method == "lora":
        peft = pytest.importorskip("peft")
        peft_files.write_adapter(str(tmp_path / "initial"), initial, model.method, model.architecture, str(path))
        network = peft.PeftModel.from_pretrained(network, str(tmp_path / "initial"), is_trainable=True)
    network.train()
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    groups = [
        {
            "params": [w for name, w in trained.items() if bool(re.search("norm|bias", name)) == plain],
            "weight_decay": 0.0 if plain else 0.1,
        }
        for plain in (False, True)
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    for step in range(STEPS):
        parts = [[rows[number] for number in part if number >= 0] for part in batches.row_numbers(step)]
        count = sum(len(tokenizer(row["output"])["input_ids"]) for part in parts for row in part)
        total = 0.0
        for part in filter(None, parts):
            loss = torch_sums(network, tokenizer, part)[0]
            (loss / count).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert metrics[step]["weight"] == count
        np.testing.assert_allclose([ours[step], metrics[step]["grad_norm"]], [total / count, norm], rtol=1e-4)


# --- through the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A QLoRA run from configs/t5.py: four steps in a process of its own, six more in this one."""
    folder = tmp_path_factory.mktemp("t5")
    path = write_model(folder / "model", "t5_gated")
    write_rows(folder / "rows.jsonl", 64, seed=1)
    held_out = write_rows(folder / "held_out.jsonl", 11, seed=2)
    words = [
        "--config.quantize.format=nf4",
        "--config.quantize.group_size=16",
        "--config.lora.target_modules=all-linear",
        "--config.model.dtype=float32",
        "--config.lora.dropout=0.0",
        "--config.train.learning_rate=2e-2",
        "--config.train.per_device_train_batch_size=1",
        "--config.train.per_device_eval_batch_size=1",
        "--config.train.logging_steps=1",
        "--config.train.eval_steps=5",
        "--config.data.num_workers=1",
        f"--config.model.path={path}",
        f"--config.data.train={folder / 'rows.jsonl'}",
        f"--config.data.eval={folder / 'held_out.jsonl'}",
        f"--config.data.cache_dir={folder / 'cache'}",
        f"--config.output_dir={folder / 'out'}",
    ]
    config = configuration.from_file(ROOT / "configs" / "t5.py")
    devices = len(jax.devices())
    first = helpers.train_process(config, folder, devices, *words, "--config.train.max_steps=4")
    assert first.returncode == 0, first.stderr
    words = ["train", "--config", str(ROOT / "configs" / "t5.py"), *words, "--config.train.max_steps=10"]
    return {"folder": folder, "model": path, "out": folder / "out", "first": first, "words": words, "held": held_out}


def said(capsys: pytest.CaptureFixture, *words: Any) -> str:
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


@pytest.fixture(scope="module")
def finished(run: dict[str, Any]) -> dict[str, Any]:
    """The same run, gone on with to its end."""
    assert main(run["words"]) == 0
    return run


def test_the_run_resumes_learns_and_is_finished(finished, capsys):
    text = finished["first"].stdout
    assert "data: 64 rows of 64 + 64 tokens, 11 rows for evaluation\n" in text
    assert "4 steps an epoch, 4 steps in 1 epoch; mini-batch" in text
    rows = helpers.metric_rows(finished["out"])
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[9] < losses[0] - 0.5
    evaluations = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert set(evaluations) == {4, 5, 10} and evaluations[10] < evaluations[4]
    told = said(capsys, *finished["words"])
    assert "this run is done: 10 of 10 steps" in told
    assert helpers.metric_rows(finished["out"]) == rows


@pytest.mark.filterwarnings("ignore")
def test_evaluation_is_torchs_on_the_dequantized_base(finished, capsys, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoTokenizer

    said(capsys, "export", finished["out"], "--base", "--output", tmp_path / "base")
    base = tiny_models.torch_model(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, str(finished["out"] / "adapter")).eval()
    with torch.no_grad():
        loss, right, count = torch_sums(model, AutoTokenizer.from_pretrained(tmp_path / "base"), finished["held"])
    row = [row for row in helpers.metric_rows(finished["out"]) if "eval_loss" in row][-1]
    assert row["eval_num_tokens"] == count
    np.testing.assert_allclose(row["eval_loss"], loss.item() / count, rtol=1e-4)
    assert row["eval_token_accuracy"] == right / count


IDS = tiny_models.input_ids("t5_gated")
ENCODER = tiny_models.input_ids("t5_gated/encoder", length=tiny_models.ENCODER_TOKENS)


@pytest.mark.filterwarnings("ignore")
def test_the_merged_export_is_a_model_to_torch(finished, capsys, tmp_path):
    from transformers import AutoTokenizer

    said(capsys, "export", finished["out"], "--merge", "--output", tmp_path / "merged")
    ours = np.asarray(tpu_tune.load(str(tmp_path / "merged"))(ENCODER, IDS))
    plain = np.asarray(tpu_tune.load(str(finished["model"]))(ENCODER, IDS))
    assert tiny_models.difference(plain, ours) > 1e-2
    tokenizers = [AutoTokenizer.from_pretrained(path)("a model") for path in (tmp_path / "merged", finished["model"])]
    assert tokenizers[0]["input_ids"] == tokenizers[1]["input_ids"]
    pytest.importorskip("torch")
    model = tiny_models.torch_model(tmp_path / "merged")
    assert tiny_models.difference(ours, tiny_models.torch_logits(model, IDS, (ENCODER, np.ones_like(ENCODER)))) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_is_a_seq2seq_one_to_peft_and_answers_alike(finished, capsys):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoTokenizer

    adapter = finished["out"] / "adapter"
    model = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(str(adapter), dtype=torch.float32).eval()
    assert type(model) is peft.PeftModelForSeq2SeqLM
    assert model.peft_config["default"].task_type == peft.TaskType.SEQ_2_SEQ_LM
    ours = np.asarray(tpu_tune.load(str(finished["model"]), adapter=str(adapter))(ENCODER, IDS))
    assert tiny_models.difference(ours, tiny_models.torch_logits(model, IDS, (ENCODER, np.ones_like(ENCODER)))) < 1e-4
    prompts = ["a tiny model", "words", "what they are and then some"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    text = said(
        capsys,
        "generate",
        "--model",
        finished["model"],
        "--adapter",
        adapter,
        *words,
        "--greedy",
        "--max-new-tokens",
        "12",
        "--json",
    )
    tokenizer = AutoTokenizer.from_pretrained(finished["model"])
    for prompt, line in zip(prompts, text.splitlines(), strict=True):
        with torch.no_grad():
            inputs = tokenizer(prompt, return_tensors="pt")
            # transformers 5 makes a cache of num_layers layers, and this decoder has one more than the encoder.
            written = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=False)
        answer = tokenizer.decode(written[0], skip_special_tokens=True)
        assert json.loads(line) == {"prompt": prompt, "answer": answer}


def test_a_prompt_ends_as_inputs_did_in_training(finished):
    """A tokenizer that puts no EOS behind a text by itself, as one rebuilt from a GGUF might."""
    from tokenizers import processors

    from tpu_tune.inference import Sampling

    model = tpu_tune.load(str(finished["model"]))
    expected = model.generate(["some words"], Sampling(max_new_tokens=6))
    model.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert model.tokenizer("some words")["input_ids"][-1] != model.tokenizer.eos_token_id
    assert model.generate(["some words"], Sampling(max_new_tokens=6)) == expected


def test_rows_that_do_not_divide_over_the_sequence_axis(run):
    config = helpers.make_config(
        data__train=str(run["folder"] / "rows.jsonl"), data__cache_dir=str(run["folder"] / "cache")
    )
    data = load_data(config, tpu_tune.load(str(run["model"])).tokenizer, start_token=0)
    check_widths(data, types.SimpleNamespace(shape={"sequence": 8}))
    with pytest.raises(UserError, match="the rows are 64 tokens wide, which does not divide over mesh.sequence=3"):
        check_widths(data, types.SimpleNamespace(shape={"sequence": 3}))  # of eight devices there is no such mesh


def test_inspect_tells_encoder_decoder_and_cross_attention_apart(run, capsys):
    text = said(capsys, "inspect", run["model"], "--config.lora.target_modules=all-linear")
    assert "num_layers: 3\n  num_encoder_layers: 2\n" in text
    for name, role in (
        ("shared", "turns token ids into vectors"),
        ("encoder.block.N.layer.0.SelfAttention.q", "attention: queries"),
        ("decoder.block.N.layer.0.SelfAttention.k", "attention: keys"),
        ("decoder.block.N.layer.1.EncDecAttention.v", "attention to the encoder: values"),
        ("decoder.block.N.layer.1.EncDecAttention.o", "attention to the encoder: output"),
        ("encoder.block.N.layer.1.DenseReluDense.wi_0", "MLP: gate"),
        ("decoder.block.N.layer.2.DenseReluDense.wo", "MLP: down"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "turns distances into a bias on the scores"),
        ("lm_head", "turns vectors into logits"),
    ):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{name} ")]
        assert line.endswith(f" {role}")
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = tiny_models.torch_model(run["model"])
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
    trained, total = model.get_nb_trainable_parameters()
    assert f"trainable params: {trained:,} || all params: {total:,} ||" in text


def test_the_count_in_the_config_file_is_right():
    """flan-t5-base's config.json, as far as it decides sizes."""
    arch = architecture(
        {
            "model_type": "t5",
            "d_model": 768,
            "d_ff": 2048,
            "d_kv": 64,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        }
    )
    spec = LoraConfig(**configuration.from_file(ROOT / "configs" / "t5.py").lora)
    trained = sum(target.num_parameters for target in find_targets(arch.modules(), spec).adapted)
    total = sum(int(np.prod(shape)) for shape in arch.leaf_shapes().values())
    share = 100 * trained / (trained + total)
    words = f"trainable params: {trained:,} || all params: {trained + total:,} || trainable%: {share:.4f}"
    assert words in (ROOT / "configs" / "t5.py").read_text()
