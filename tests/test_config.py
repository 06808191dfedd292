"""The configuration: the contract's keys, what the command line and config files may write, and what is refused."""

import json
import math
import pathlib
import re
import subprocess
import sys
import typing

import numpy as np
import pytest

import tpu_tune
from tpu_tune import config as configuration
from tpu_tune.data.formats import NAMES as ROW_FORMATS
from tpu_tune.data.recipe import settings as recipe_settings
from tpu_tune.errors import UserError
from tpu_tune.kernels.attention import IMPLEMENTATIONS
from tpu_tune.models.scan import REMAT_POLICIES
from tpu_tune.tensors import FORMATS

# Others build on these names: config files, launch scripts and recorded runs.
CONTRACT = {
    "": "output_dir method seed",
    "model": "path dtype param_dtype attention remat adapter",
    "quantize": "format group_size double_quant symmetric calibration include exclude",
    "lora": "rank alpha dropout target_modules exclude_modules bias modules_to_save layers_to_transform layers_pattern "
    "rank_pattern alpha_pattern use_rslora use_dora",
    "data": "train eval format columns chat_template chat_template_kwargs max_length packing train_on_source "
    "source_max_len target_max_len skip_bad_rows data_seed",
    "train": "num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps warmup_ratio optim adam_beta1 adam_beta2 "
    "adam_epsilon weight_decay max_grad_norm optim_offload logging_steps logging_first_step eval_strategy eval_steps "
    "save_strategy save_steps save_total_limit load_best_model_at_end early_stopping_patience report_to",
    "objective": "name loss_type loss_weights beta label_smoothing sft_weight simpo_gamma cpo_alpha desirable_weight "
    "undesirable_weight reference",
    "mesh": "data fsdp tensor sequence",
}
KEYS = [f"{room}.{key}".lstrip(".") for room, keys in CONTRACT.items() for key in keys.split()]
ROOT = pathlib.Path(__file__).parents[1]


def assigned(key, value):
    config = configuration.default()
    configuration.assign(config, key, value)
    return configuration.config_get(configuration.check(config), key)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_contract_exists(key):
    assert key in dict(configuration.flatten(configuration.default()))


def test_every_key_is_explained():
    assert set(configuration.SCHEMA.keys) == set(dict(configuration.flatten(configuration.default())))
    for name, key in configuration.SCHEMA.keys.items():
        assert key.meaning, name


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("model.attention", IMPLEMENTATIONS),
        ("model.remat", ("auto", "none", *REMAT_POLICIES)),
        ("quantize.format", ("none", *FORMATS)),
        ("data.format", ROW_FORMATS),
    ],
)
def test_choices_are_what_there_is(name, there):
    assert set(typing.get_args(configuration.SCHEMA.keys[name].type)) == set(there)


@pytest.mark.parametrize(
    "name", [name for name, key in configuration.SCHEMA.keys.items() if re.search(r"\bfloat\b", str(key.type))]
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_is_without_end(name, value):
    value = {"a": float(value)} if "Mapping" in str(configuration.SCHEMA.keys[name].type) else value
    with pytest.raises(UserError, match=f"^config key '{name}' .*finite"):
        assigned(name, value)


@pytest.mark.parametrize("name", [name for name, key in configuration.SCHEMA.keys.items() if key.type is int])
@pytest.mark.parametrize("value", [2**80, -(2**80), -2, 1e300, "1e999"])
def test_no_whole_number_is_larger_than_a_computer_s(name, value):
    with pytest.raises(UserError, match=f"^config key '{name}' is "):
        assigned(name, value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.learning_rate", "2e-4", 2e-4),
        ("train.learning_rate", "1", 1.0),
        ("train.max_steps", "10", 10),
        ("train.max_steps", 10.0, 10),
        ("train.logging_steps", "5", 5),
        ("train.logging_steps", 5.0, 5),
        ("train.save_steps", "0.25", 0.25),
        ("train.adam_epsilon", "1e-37", 1e-37),
        ("data.packing", "False", False),
        ("data.packing", "1", True),
        ("lora.target_modules", "all-linear", "all-linear"),
        ("lora.target_modules", "q_proj,v_proj", ["q_proj", "v_proj"]),
        ("lora.target_modules", '["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("lora.target_modules", ("q_proj",), ["q_proj"]),
        ("lora.target_modules", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("lora.target_modules", r"layers\.[0-3],x", r"layers\.[0-3],x"),
        ("lora.target_modules", r".*\.layers\.\d{1,2}\.mlp", r".*\.layers\.\d{1,2}\.mlp"),
        ("lora.layers_to_transform", "[0, 2]", [0, 2]),
        ("lora.layers_to_transform", "0,2", [0, 2]),
        ("lora.modules_to_save", "lm_head", ["lm_head"]),
        ("lora.modules_to_save", "", []),
        ("lora.target_modules", "", ""),
        ("lora.target_modules", "q_proj", ["q_proj"]),
        ("quantize.exclude", "lm_head", ["lm_head"]),
        ("lora.layers_to_transform", "3", [3]),
        ("lora.alpha_pattern", '{"q_proj": 16}', {"q_proj": 16.0}),
        ("train.lr_scheduler_kwargs", '{"min_lr_rate": 0.1}', {"min_lr_rate": 0.1}),
        ("lora.rank_pattern", '{"model.layers.0.self_attn.q_proj": 16}', {"model.layers.0.self_attn.q_proj": 16}),
        ("lora.init_lora_weights", True, "true"),
        ("data.columns", '{"question": "input"}', {"question": "input"}),
        ("data.response_markers", '["### Response:"]', ["### Response:"]),
        ("train.report_to", "wandb,tensorboard", ["wandb", "tensorboard"]),
        ("seed", "-1", -1),
        ("mesh.fsdp", "4", 4),
        ("output_dir", "123", "123"),
        ("lora.alpha", np.float32(2), 2.0),
        ("seed", np.int64(3), 3),
    ],
)
def test_text_becomes_the_type_of_its_key(key, text, value):
    found = assigned(key, text)
    assert found == value and type(found) is type(value)


def test_one_entry_of_a_free_dict():
    config = configuration.default()
    configuration.assign(config, "data.columns.question", "input")
    configuration.assign(config, "data.columns.answer", "output")
    configuration.assign(config, "lora.rank_pattern.model.layers.0.mlp.up_proj", "4")
    assert configuration.config_get(config, "data.columns") == {"question": "input", "answer": "output"}
    assert configuration.config_get(config, "lora.rank_pattern") == {"model.layers.0.mlp.up_proj": 4}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.learning_rat", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("lora.r", "lora.rank"),
        ("model.pth", "model.path"),
        ("trian.max_steps", "train.max_steps"),
        ("train.optimizer", "train.optim"),
        ("lora.lora_alpha", "lora.alpha"),
        ("train.eval_step", "train.eval_steps"),
        ("max_steps", "train.max_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, near):
    with pytest.raises(UserError, match=re.escape(f"unknown config key '{key}'; did you mean '{near}'?")):
        assigned(key, "1")


@pytest.mark.parametrize("key", ["xyzzy", "train", "lora.rank.x"])
def test_what_is_no_key(key):
    with pytest.raises(UserError, match=f"'{key}'"):
        assigned(key, "1")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.max_steps", "ten", "'ten'; it must be of type int"),
        ("train.max_steps", "1.5", "type int"),
        ("train.max_steps", True, "type int"),
        ("train.learning_rate", "fast", "type float"),
        ("data.packing", "maybe", "type bool"),
        ("data.packing", 3, "type bool"),
        ("output_dir", 3, "type str"),
        ("lora.target_modules", 3, "type str or list"),
        ("lora.layers_to_transform", '{"a": 1}', "type list"),
        ("lora.layers_to_transform", "first", "whole numbers"),
        ("lora.rank_pattern", "q_proj", "type dict"),
        ("lora.rank_pattern", '{"q_proj": "big"}', "numbers"),
        ("lora.target_modules", '["q_proj"', "is not JSON"),
        ("data.columns", "{question: input}", "is not JSON"),
        ("lora.modules_to_save", "[" * 50_000, "is nested too deep"),
        ("train.lr_scheduler_kwargs", '{"a": ' + "[" * 600 + "]" * 600 + "}", "is nested too deep"),
        ("train.learning_rate", 10**400, "type float"),
        ("seed", np.float64("nan"), "type int"),
        ("lora.trainable_token_indices", {"lm_head": 3.5}, "its entries must be lists"),
    ],
)
def test_wrong_types_name_the_key(key, value, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        assigned(key, value)
    assert f"'{key}'" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.dtype", "fp16", "bfloat16, float16, float32"),
        ("quantize.format", "int3", "none, int8, int4, nf4, mxfp4"),
        ("train.eval_strategy", "always", "no, steps, epoch"),
        ("data.format", "chatml", "messages"),
        ("lora.rank", 0, "positive"),
        ("train.logging_steps", -1, "positive"),
        ("lora.dropout", 1.0, "below 1"),
        ("data.eval_ratio", 1.0, "below 1"),
        ("data.eval_ratio", -0.1, "at least 0"),
        ("train.learning_rate", -1e-4, "negative"),
        ("train.learning_rate", "nan", "negative"),
        ("train.warmup_ratio", -0.1, "at least 0 and at most 1"),
        ("train.warmup_ratio", 1.1, "at least 0 and at most 1"),
        ("train.adam_beta1", 1.0, "at least 0 and below 1"),
        ("train.adam_epsilon", 0, "positive"),
        ("train.max_steps", -2, "at least -1"),
        ("lora.rank", 2**31, "positive and at most 2147483647"),
        ("lora.rank_pattern", {"q_proj": 0}, "its entries must be positive"),
        ("lora.layers_to_transform", [-1], "its entries must not be negative"),
        ("lora.trainable_token_indices", {"lm_head": [-1]}, "its entries must not be negative"),
        ("train.lr_scheduler_kwargs", {"power": math.inf}, "its entries must be finite"),
        ("seed", 2**32, "at least -1 and at most 4294967295"),
        ("mesh.tensor", 0, "-1 or positive"),
        ("mesh.tensor", -2, "-1 or positive"),
        ("train.num_train_epochs", 0, "positive"),
        ("train.eval_steps", 1.5, "a whole number of updates, or a share of the run below 1"),
        ("train.save_steps", 0, "positive"),
        ("train.learning_rate", 1e39, "between 1.2e-38 and 3.4e+38, as float32 is"),
        ("train.adam_epsilon", 1e-40, "between 1.2e-38 and 3.4e+38, as float32 is"),
        ("lora.alpha_pattern", {"q_proj": 1e300}, "as float32 is"),
        ("train.lr_scheduler_kwargs", {"power": -1e300}, "as float32 is"),
    ],
)
def test_values_out_of_bounds_name_the_key_and_what_is_allowed(key, value, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        assigned(key, value)
    assert f"'{key}'" in str(error.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"method": "full", "quantize": {"format": "nf4"}}, "cannot be trained"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "only one"),
        ({"train": {"load_best_model_at_end": True, "eval_strategy": "no"}}, "train.eval_strategy"),
        ({"train": {"load_best_model_at_end": True, "save_strategy": "no"}}, "train.save_strategy"),
        ({"train": {"early_stopping_patience": 2}, "data": {"eval_ratio": 0}}, "data.eval"),
    ],
)
def test_settings_that_exclude_each_other(values, says):
    with pytest.raises(UserError, match=says):
        configuration.from_dict(values)


@pytest.mark.parametrize("schema", [configuration.SCHEMA, recipe_settings.SCHEMA], ids=lambda schema: schema.noun)
@pytest.mark.parametrize(
    "value",
    [
        "", "x", "1", "-1", "1e999", "nan", "NaN", "[NaN]", "true", "none", "[", "{", "[1]", "[[1]]", '["a"]',
        '{"a":1}', "a,b", "\x00", "1_0", "٣", "[" * 5000, f"[{'9' * 5000}]", 0, -1, 3.5, math.nan, math.inf, 10**400,
        1j, True, None, [], [1], ["a"], [None], {}, {"a": 1}, {"a": {"b": [1]}}, {1: 2}, (1, 2), b"x", object(),
    ],
    ids=lambda value: repr(value)[:20].partition(" object")[0],
)  # fmt: skip
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(schema, value):
    for name in schema.keys:
        config = schema.default()
        try:
            schema.assign(config, name, value)
            schema.check(config)
        except UserError as error:
            assert "\n" not in str(error)


def test_a_value_set_past_assign_is_checked_too():
    config = configuration.default()
    config.train.max_steps = "ten"
    with pytest.raises(UserError, match="'train.max_steps' is 'ten'; it must be of type int"):
        configuration.check(config)


def test_a_section_s_dataclass_has_the_defaults_of_its_keys():
    config = configuration.default()
    assert configuration.LoraConfig(**config.lora) == configuration.LoraConfig()
    assert configuration.QuantizeConfig(**config.quantize) == configuration.QuantizeConfig()


def test_a_round_trip_through_json():
    config = configuration.from_dict({"lora": {"rank_pattern": {"a.b": 3}, "target_modules": ["q_proj"]}, "seed": 7})
    again = configuration.from_dict(json.loads(json.dumps(configuration.to_dict(config))))
    assert again == config and again.lora.rank_pattern == {"a.b": 3}


def test_defaults_are_fresh_each_time():
    configuration.default().lora.modules_to_save.append("lm_head")
    assert configuration.default().lora.modules_to_save == []


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.stem)
def test_the_configs_that_come_with_it_load(file):
    if file.stem.startswith("data_"):
        assert recipe_settings.read(str(file)).steps
        return
    config = configuration.from_file(file)
    assert set(dict(configuration.flatten(config))) == set(dict(configuration.flatten(configuration.default())))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("import nowhere_at_all", "nowhere_at_all"),
        ("def get_config():\n    return {'train': {'learning_rat': 1}}", "did you mean 'train.learning_rate'"),
        ("def get_config():\n    return {'lora': 3}", "lora"),
        ("def get_config():\n    return None", "get_config"),
        (
            "from tpu_tune.config import default\ndef get_config():\n    c = default()\n"
            "    c.train.learning_rat = 1\n    return c",
            "did you mean 'train.learning_rate'",
        ),
        (
            "from tpu_tune.config import default\ndef get_config():\n    c = default()\n"
            "    c.train.max_steps = 'ten'\n    return c",
            "train.max_steps",
        ),
    ],
)
def test_broken_config_files_are_named(tmp_path, text, says):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        configuration.from_file(file)
    assert str(file) in str(error.value) and says in str(error.value)


def test_a_missing_config_file(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        configuration.from_file(tmp_path / "none.py")


def test_a_config_file_may_use_either_type(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from tpu_tune.config import default\ndef get_config():\n    c = default()\n"
        "    c.lora.target_modules = ['q_proj']\n    c.lora.exclude_modules = '.*k_proj'\n"
        "    c.lora.alpha = 32\n    return c\n"
    )
    config = configuration.from_file(file)
    assert (config.lora.target_modules, config.lora.exclude_modules, config.lora.alpha) == (
        ["q_proj"],
        ".*k_proj",
        32.0,
    )
    assert isinstance(config.lora.alpha, float)


def test_a_config_file_may_say_only_what_differs(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return {'seed': 3, 'lora': {'target_modules': ('q_proj',)}}")
    config = configuration.from_file(str(file))
    assert config.seed == 3 and config.lora.target_modules == ["q_proj"] and config.lora.rank == 8


def test_the_package_is_typed_and_waits_with_jax():
    assert (pathlib.Path(tpu_tune.__file__).parent / "py.typed").exists()
    returns = {name: getattr(tpu_tune, name).__annotations__["return"] for name in ("load", "train", "plan")}
    assert returns == {"load": "Model", "train": "Run", "plan": "dict[str, Any]"}
    subprocess.run([sys.executable, "-c", "import sys, tpu_tune; assert 'jax' not in sys.modules"], check=True)
