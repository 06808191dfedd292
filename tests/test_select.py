"""PEFT's matching rules, held against peft itself on the modules of tiny models."""

import pytest
import tiny_models

from tpu_tune.errors import UserError
from tpu_tune.models import architecture
from tpu_tune.transforms import LoraConfig, find_targets
from tpu_tune.transforms.select import by_pattern, matches, targeted

LAYERED = r".*layers\.\d+\..*"
RULES = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": ["proj"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    ("llama", {"target_modules": ["lm_head", "o_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": r".*\.(q|v)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.[02]\.mlp\.\w+_proj"}),
    ("llama", {"target_modules": "q_proj"}),
    ("llama", {"target_modules": r".*_proj", "layers_to_transform": None, "exclude_modules": r".*mlp.*"}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": ["model.layers.2.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "blocks"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ("gpt_neox", {"target_modules": ["query_key_value"]}),
    ("gpt_neox", {"target_modules": ["dense"]}),
    ("gpt_neox", {"target_modules": "all-linear"}),
    ("gpt_neox", {"target_modules": ["dense", "dense_h_to_4h"], "layers_to_transform": [1]}),
    ("gpt_neox", {"target_modules": r".*attention\..*"}),
]
CASE = {"llama": "llama2", "gpt_neox": "neox_parallel"}


def modules_of(family):
    return architecture({**tiny_models.CONFIGS[CASE[family]], "num_hidden_layers": 3}).modules()


@pytest.fixture(scope="module")
def torch_models(tmp_path_factory):
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("models")
    return {
        family: tiny_models.write(folder / family, {**tiny_models.CONFIGS[case], "num_hidden_layers": 3})
        for family, case in CASE.items()
    }


def our_names(family, rule):
    modules = modules_of(family)
    rule = {key: value for key, value in rule.items() if value is not None}
    if isinstance(rule.get("layers_pattern"), list):
        rule["layers_pattern"] = "|".join(rule["layers_pattern"])
    targets = find_targets(modules, LoraConfig(**rule))
    return {target.module.name(layer) for target in targets.adapted for layer in (target.layers or (None,))}


@pytest.mark.parametrize(("family", "rule"), RULES, ids=[str(number) for number in range(len(RULES))])
@pytest.mark.filterwarnings("ignore")
def test_peft_targets_the_same_modules(family, rule, torch_models):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import LoraLayer

    model = tiny_models.torch_model(torch_models[family])
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **rule))
    except ValueError:
        with pytest.raises(UserError):
            our_names(family, rule)
        return
    theirs = {
        name.removeprefix("base_model.model.").replace("lm_head", "embed_out")
        if family == "gpt_neox"
        else name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert our_names(family, rule) == theirs


@pytest.mark.parametrize(
    "table", [{"q_proj": 1}, {r"layers\.1\..*": 2, "q_proj": 3}, {"self_attn.q_proj": 4}, {"_proj": 5}, {"^model.*": 6}]
)
def test_patterns_of_ranks_are_looked_up_as_peft_does(table):
    utils = pytest.importorskip("peft.utils.other")
    for module in modules_of("llama"):
        for name in module.names():
            assert by_pattern(table, name, None) == table.get(utils.get_pattern_key(table, name))


def test_what_matches_nothing_lists_the_choices():
    modules = modules_of("llama")
    listed = "choose among embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
    with pytest.raises(UserError, match=f"lora.target_modules: 'query' matches no module; {listed}"):
        find_targets(modules, LoraConfig(target_modules=["q_proj", "query"]))
    with pytest.raises(UserError, match=listed):
        find_targets(modules, LoraConfig(target_modules=r"layers\.0"))
    with pytest.raises(UserError, match="no target is in the layers 7"):
        find_targets(modules, LoraConfig(target_modules=["q_proj"], layers_to_transform=[7]))
    with pytest.raises(UserError, match="modules_to_save: 'heads' matches no module.*lm_head"):
        find_targets(modules, LoraConfig(modules_to_save=["heads"]))
    with pytest.raises(UserError, match="'proj' takes 'model.layers.self_attn.q_proj', which has an adapter too"):
        find_targets(modules, LoraConfig(target_modules=["q_proj"], modules_to_save=["proj"]))
    with pytest.raises(UserError, match="'\\*proj' is not a regular expression"):
        find_targets(modules, LoraConfig(target_modules="*proj"))
    with pytest.raises(UserError, match="matches the norm 'model.norm'.*modules_to_save"):
        find_targets(modules, LoraConfig(target_modules=["norm"]))


def test_all_linear_keeps_to_the_asked_layers():
    """Unlike peft, which forgets layers_to_transform here because it lists full names."""
    found = targeted(modules_of("llama"), "all-linear", layers=[1])
    assert set(found.values()) == {(1,)} and len(found) == 7


def test_names_match_whole_parts():
    assert matches("model.layers.0.mlp.up_proj", ["up_proj"]) and matches("lm_head", ["lm_head"])
    assert not matches("model.layers.0.mlp.up_proj", ["p_proj"])
    assert not matches("model.layers.0.mlp.up_proj", "up_proj")
