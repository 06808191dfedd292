"""LoRA on experts: what it computes, its gradients, and PEFT's two forms of its files, both ways."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file

from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.params import load_params
from tpu_tune.checkpoints.peft import read_adapter, write_adapter
from tpu_tune.errors import UserError
from tpu_tune.inference.inspection import inspect_model
from tpu_tune.inference.model import logits
from tpu_tune.models import architecture
from tpu_tune.transforms import LoraConfig, QuantizeConfig, find_targets, merge

IDS = np.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), np.int32)
CASES = ["mixtral", "qwen3_moe", "qwen2_moe", "granitemoe", "olmoe", "gemma4_experts", "gpt_oss"]
BY_NAME = {"target_modules": ["gate_up_proj", "down_proj", "q_proj"]}  # all-linear leaves gpt-oss' experts out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Function case -> (torch's class and directory of a tiny model, architecture, params)."""

    @functools.cache
    def of(case):
        config = tiny_models.CONFIGS[case]
        directory = tiny_models.write(tmp_path_factory.mktemp(case), config)
        source = open_huggingface(directory)
        arch = architecture(source.config)
        return directory, arch, load_params(source, arch)

    return of


def adapted(arch, params, **settings):
    """Targets of a LoRA on everything, and adapters none of which is zero."""
    spec = LoraConfig(**{"rank": 3, "alpha": 6.0, "target_modules": "all-linear", **settings})
    targets = find_targets(arch.modules(), spec, arch.default_targets)
    adapters = targets.init(params, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(adapters))
    specs = dict(zip(adapters, keys, strict=True))
    noisy = {path: leaf + 0.2 * jax.random.normal(specs[path], leaf.shape) for path, leaf in adapters.items()}
    for target in targets.adapted:  # padding of shorter ranks stays zero
        assert len({*target.ranks}) == 1
    return targets, noisy


def ours(arch, params):
    return np.asarray(logits(arch, jnp.dtype("float32"), params, jnp.asarray(IDS)))


def in_peft(directory, adapter):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(tiny_models.torch_model(directory), adapter)
    with torch.no_grad():
        return model(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("case", ["qwen3_moe", "granitemoe", "gpt_oss"])
def test_logits_and_gradients_are_those_of_merged_experts(case, models):
    """Of a full weight W + s A B, from whose gradient those of A and B follow."""
    _, arch, params = models(case)
    targets, adapters = adapted(arch, params, **(BY_NAME if case == "gpt_oss" else {}))
    trainable, frozen = targets.split(params, adapters)

    def loss(tree):
        out = logits(arch, jnp.dtype("float32"), tree, jnp.asarray(IDS))
        return jnp.sum(jnp.sin(jnp.arange(out.size).reshape(out.shape)) * out), out

    (_, out), grads = jax.value_and_grad(lambda t: loss(targets.combine(t, frozen)), has_aux=True)(trainable)
    whole = merge(targets.combine(trainable, frozen))
    (_, expected), full = jax.value_and_grad(loss, has_aux=True)(whole)
    assert tiny_models.difference(out, expected) < 1e-5
    assert np.abs(np.asarray(out) - ours(arch, params)).max() > 1e-2
    for target in targets.adapted:
        if target.module.experts:
            whole_grad = full[target.module.weight] * target.scales[0]
            a, b = adapters[target.a_path], adapters[target.b_path]
            assert tiny_models.difference(grads[target.a_path], whole_grad @ jnp.swapaxes(b, -1, -2)) < 1e-4
            assert tiny_models.difference(grads[target.b_path], jnp.swapaxes(a, -1, -2) @ whole_grad) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_with_what_is_written_here(case, models, tmp_path):
    directory, arch, params = models(case)
    settings = BY_NAME if case == "gpt_oss" else {}
    if case == "qwen2_moe":  # its experts beside the MLP that all tokens go through, of the same names
        settings = {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]}
    targets, adapters = adapted(arch, params, **settings)
    write_adapter(str(tmp_path), adapters, targets, arch, "base")
    expected = ours(arch, targets.combine(*targets.split(params, adapters)))
    assert np.abs(expected - ours(arch, params)).max() > 1e-2
    assert tiny_models.difference(in_peft(directory, str(tmp_path)), expected) < 1e-4
    spec, back = read_adapter(str(tmp_path), arch)
    again = find_targets(arch.modules(), spec, arch.default_targets)
    assert tiny_models.difference(ours(arch, again.combine(*again.split(params, back))), expected) < 1e-5
    keys = load_file(tmp_path / "adapter_model.safetensors")
    single = any(".experts.0." in name for name in keys)
    assert single == (case in ("mixtral", "qwen3_moe", "olmoe"))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["gate_proj", "q_proj"]},
        {"target_modules": ["down_proj"]},
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": "all-linear", "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"down_proj": 9}},
        {"target_modules": "all-linear", "use_rslora": True, "alpha_pattern": {"down_proj": 9}},
        {"target_modules": ["mlp.gate", "down_proj"]},
    ],
    ids=["gate", "down", "one layer", "ranks", "rslora", "router"],
)
def test_peft_computes_with_parts_of_the_experts(settings, models, tmp_path):
    directory, arch, params = models("qwen3_moe")
    targets, adapters = adapted(arch, params, **settings)
    write_adapter(str(tmp_path), adapters, targets, arch, "base")
    expected = ours(arch, targets.combine(*targets.split(params, adapters)))
    assert np.abs(expected - ours(arch, params)).max() > 1e-3
    assert tiny_models.difference(in_peft(directory, str(tmp_path)), expected) < 1e-4


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=["both", "down"])
def test_what_peft_writes_is_read(case, parameters, models, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    directory, arch, params = models(case)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=[f"experts.{name}" for name in parameters]
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_models.torch_model(directory), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    spec, adapters = read_adapter(str(tmp_path), arch)
    targets = find_targets(arch.modules(), spec, arch.default_targets)
    found = ours(arch, targets.combine(*targets.split(params, adapters)))
    with torch.no_grad():
        expected = model(torch.tensor(IDS, dtype=torch.long)).logits.numpy()
    assert tiny_models.difference(found, expected) < 1e-4
    assert np.abs(found - ours(arch, params)).max() > 1e-3


def test_over_quantized_experts_the_base_is_the_codes(models):
    _, arch, params = models("qwen3_moe")
    source = tiny_models.source(tiny_models.CONFIGS["qwen3_moe"])
    tree = load_params(source, arch, quantization=QuantizeConfig(format="nf4", group_size=16))
    targets, adapters = adapted(arch, params)
    combined = targets.combine(*targets.split(tree, adapters))
    assert tiny_models.difference(ours(arch, combined), ours(arch, merge(combined))) < 1e-5


def test_what_experts_cannot_carry_is_refused_and_what_they_carry_is_counted(models):
    directory, arch, _ = models("qwen3_moe")
    for settings, message in (
        ({"dropout": 0.1}, "lora.dropout=0.1: the adapters on the experts .* have no dropout"),
        ({"use_dora": True}, "lora.use_dora: there is no DoRA on the experts"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}, "are experts, which have no trained copy"),
        ({"rank_pattern": {r"experts\.1\.up_proj": 2}}, "lora.rank_pattern gives the experts of .* different values"),
    ):
        with pytest.raises(UserError, match=message):
            find_targets(arch.modules(), LoraConfig(**{"target_modules": "all-linear", **settings}))
    attention = LoraConfig(target_modules="all-linear", dropout=0.1, exclude_modules=r".*experts.*")
    assert not any(target.module.experts for target in find_targets(arch.modules(), attention).adapted)
    spec = LoraConfig(rank=3, target_modules=["up_proj"])
    (target,) = find_targets(arch.modules(), spec).adapted
    assert target.num_parameters == 3 * len(target.layers) * target.module.experts * sum(target.module.shape)
    assert inspect_model(directory, spec)["lora"]["trainable"] == target.num_parameters


def test_parameters_that_are_no_experts_are_refused(models, tmp_path):
    _, arch, params = models("qwen3_moe")
    targets, adapters = adapted(arch, params, target_modules=["q_proj"])
    write_adapter(str(tmp_path), adapters, targets, arch, "base")
    file = pathlib.Path(tmp_path, "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_parameters": ["norm.weight"]}))
    with pytest.raises(UserError, match="target_parameters norm names no experts of this model"):
        read_adapter(str(tmp_path), arch)
