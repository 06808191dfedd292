"""Warnings before a run that would come to little: each setting alone, in plan and in train."""

import pytest
from helpers_training import make_config

import tpu_tune
from tpu_tune import planning
from tpu_tune.training import too_little
from tpu_tune.training.arithmetic import AT_THE_END, run_length
from tpu_tune.transforms import LoraConfig, find_targets


def warnings(rows=1000, per_device=8, accumulation=1, examples=None, evaluates=True, **keys):
    config = make_config(
        train__per_device_train_batch_size=per_device, train__gradient_accumulation_steps=accumulation, **keys
    )
    train = config.train
    length = run_length(rows, per_device, 1, accumulation, train.num_train_epochs, train.max_steps)
    return too_little.of_length(config, length, evaluates, examples)


def test_an_ordinary_run_has_none():
    assert warnings() == []
    assert warnings(train__warmup_ratio=0.1, train__lr_scheduler_type="cosine", train__eval_steps=0.1) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train__max_steps": 5}, "only 5 updates, from which little is learned; raise train.max_steps (5)"),
        ({"rows": 8, "train__num_train_epochs": 1.0}, "only 1 update, from which"),
        (
            {"rows": 60, "accumulation": 4},
            "only 6 updates, from which little is learned; raise train.num_train_epochs (3), or lower "
            "train.gradient_accumulation_steps (4)",
        ),
        ({"rows": 60, "per_device": 16}, "or lower train.per_device_train_batch_size (16)"),
        (
            {"train__eval_steps": 500},
            "train.eval_steps=500 is beyond the run's 375 updates, so the only evaluation is at the end; "
            "train.eval_steps=0.1 is every tenth of the run",
        ),
        (
            {"train__logging_steps": 500, "train__logging_first_step": False},
            "train.logging_steps=500 is beyond the run's 375 updates, so the only metrics are the last update's",
        ),
        (
            {"train__warmup_steps": 400},
            "train.warmup_steps=400 is a warm-up as long as the run's 375 updates, so train.learning_rate is never",
        ),
        ({"train__warmup_ratio": 1.0}, "train.warmup_ratio=1 is a warm-up as long as the run's 375 updates"),
        (
            {"train__warmup_ratio": 0.03, "train__lr_scheduler_type": "constant"},
            "train.warmup_ratio=0.03 has no effect: train.lr_scheduler_type=constant has no warm-up; "
            "constant_with_warmup has one",
        ),
        (
            {"rows": 3, "examples": 60, "train__max_steps": 100},
            "packing makes 3 rows of 60 examples, fewer than the 8 of a batch; lower "
            "train.per_device_train_batch_size (8), or lower data.max_length (2048) or set data.packing=False",
        ),
        (
            {"rows": 3, "data__packing": False, "train__max_steps": 100},
            "there are 3 rows, fewer than the 8 of a batch; lower train.per_device_train_batch_size (8)",
        ),
    ],
)
def test_what_is_rarely_meant_names_its_key(settings, said):
    assert any(said in line for line in warnings(**settings)), warnings(**settings)


def test_what_was_chosen_is_not_warned_of():
    assert not warnings(train__eval_steps=500, evaluates=False)
    assert not warnings(train__eval_steps=500, train__eval_strategy="epoch")
    assert not warnings(train__eval_steps=AT_THE_END)  # tpu-tune hf: one evaluation, at the end


@pytest.mark.parametrize(
    ("lora", "known", "warns"),
    [
        ({}, (), True),
        ({}, ("<|a|>", "<|b|>"), False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, (), False),
        ({"modules_to_save": ["embed_tokens"]}, (), False),
        ({"trainable_token_indices": [3]}, (), False),
    ],
)
def test_added_tokens_that_nobody_trains(lora, known, warns):
    config = make_config(model__add_special_tokens=["<|a|>", "<|b|>"])
    arch = tpu_tune.models.architecture(planning.presets.PRESETS["smollm2-135m"])
    method = find_targets(arch.modules(), LoraConfig(**{**config.lora, **lora}))
    lines = too_little.of_tokens(config, arch, method, known)
    assert len(lines) == warns and all("<|a|>, <|b|> are not trained" in line for line in lines)
    assert too_little.of_tokens(config, arch, tpu_tune.transforms.FULL) == []


def test_a_plan_says_it_too():
    config = {"model": {"path": "smollm2-135m", "add_special_tokens": ["<|a|>"]}, "train": {"max_steps": 7}}
    notes = planning.plan(config, "v5e-1", rows=100, compile=False)["notes"]
    assert any("only 7 updates" in note for note in notes) and any("<|a|> are not trained" in note for note in notes)
