"""Layers of gated DeltaNet: how they are grouped, stored, quantized and refused; what they compute is in other tests.

`test_models.py` and `test_families.py` hold them, as every family, against torch, and a packed row against its
documents; `test_delta_rule.py` holds the recurrence against its definition.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import Mesh

from tpu_tune import UserError
from tpu_tune import config as configuration
from tpu_tune.checkpoints.params import load_params, torch_shapes
from tpu_tune.inference.inspection import ROLES
from tpu_tune.models import Decoder, architecture, empty_cache
from tpu_tune.models.groups import LayerGroup
from tpu_tune.planning.flops import step_work
from tpu_tune.planning.presets import PRESETS
from tpu_tune.tensors import QuantizedTensor, dense
from tpu_tune.training.prepare_model import abstract_model
from tpu_tune.transforms import LoraConfig, QuantizeConfig, find_targets, sharding
from tpu_tune.transforms.merge import merged_tensors
from tpu_tune.transforms.quantize import quantized_paths

CASES = ["qwen3_5", "qwen3_next"]


def test_three_deltanets_and_an_attention_are_one_group() -> None:
    arch = architecture(PRESETS["qwen3.5-9b"])
    assert arch.groups == (LayerGroup(0, 4, 8),)
    attention = [layer for layer, kind in enumerate(arch.layer_kinds) if kind.delta is None]
    assert attention == [3, 7, 11, 15, 19, 23, 27, 31]
    assert arch.layer_kinds[3].rope.dim == 64 and arch.layer_kinds[3].rope.theta == 1e7


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_written_as_it_was_read(case: str) -> None:
    """Columns lie head by head in the tree, and as the file has them in a file; the taps keep torch's three axes."""
    config = tiny_models.CONFIGS[case]
    arch, params = tiny_models.load(config)
    written, expected = dict(merged_tensors(params, arch.modules())), tiny_models.weights(config)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor)
    assert torch_shapes(arch)["model.layers.0.linear_attn.conv1d.weight"] == (56, 1, 4)
    assert torch_shapes(arch)["model.layers.0.linear_attn.A_log"] == (4,)


@pytest.mark.parametrize("case", CASES)
def test_quantization_leaves_the_gates_and_what_is_no_matrix(case: str) -> None:
    """What comes out of the gates is exponentiated and multiplied up over a row; they are a thousandth of a model."""
    modules = architecture(tiny_models.CONFIGS[case]).modules()
    format = {"format": "nf4", "group_size": 8}
    names = {
        path.split("linear_attn.")[1]
        for path in quantized_paths(modules, QuantizeConfig(**format))
        if "attn." in path and "linear" in path
    }
    parts = ("qkvz",) if case == "qwen3_next" else ("qkv", "z")
    assert names == {f"in_proj_{part}.weight" for part in parts} | {"out_proj.weight"}
    gate = "in_proj_ba" if case == "qwen3_next" else "in_proj_a"
    (named,) = quantized_paths(modules, QuantizeConfig(**format, include=[gate]))
    assert named.endswith(f"{gate}.weight")
    for name in ("conv1d", "A_log", "dt_bias"):
        with pytest.raises(UserError, match=f"quantize.include names .*{name}'; only matrices can be quantized"):
            quantized_paths(modules, QuantizeConfig(**format, include=[name]))
        with pytest.raises(UserError, match=f"lora.target_modules matches .*{name}', which has no matrix to adapt"):
            find_targets(modules, LoraConfig(target_modules=[name]), ())
    with pytest.raises(UserError, match="A_log' cannot carry an adapter: it is a tensor of another module"):
        find_targets(modules, LoraConfig(target_modules=["o_proj"], modules_to_save=["A_log"]), ())


def test_a_quantized_model_computes_with_its_quantized_weights() -> None:
    config = {**tiny_models.CONFIGS["qwen3_5"], "hidden_size": 64}
    arch = architecture(config)
    params = load_params(tiny_models.source(config), arch, quantization=QuantizeConfig(format="nf4", group_size=16))
    assert isinstance(params["model.layers.linear_attn.in_proj_qkv.weight"], QuantizedTensor)
    ids = tiny_models.input_ids("nf4")
    exact = tiny_models.logits(arch, {path: dense(leaf) for path, leaf in params.items()}, ids)
    assert tiny_models.difference(tiny_models.logits(arch, params, ids), exact) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_all_linear_is_pefts(case: str, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_models.torch_model(tiny_models.write(tmp_path, tiny_models.CONFIGS[case])),
        peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    theirs = {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    modules = architecture(tiny_models.CONFIGS[case]).modules()
    found = find_targets(modules, LoraConfig(target_modules="all-linear"), ())
    ours = {target.module.name(layer) for target in found.adapted for layer in target.layers}
    if case == "qwen3_next":  # peft takes its MLPs for experts, dense or not
        ours = {name for name in ours if ".mlp." not in name}
    assert ours == theirs


def test_a_prompt_in_pieces_is_the_prompt() -> None:
    """Taps and states go on from call to call, whatever the pieces; keys and values beside them."""
    arch, params = tiny_models.load(tiny_models.CONFIGS["qwen3_5"])
    ids = jnp.asarray(tiny_models.input_ids("pieces", 2, 16))

    @jax.jit
    def run(piece, cache):
        model = Decoder(arch, params)
        hidden, cache = model.hidden(piece, segment_ids=jnp.ones_like(piece), cache=cache)
        return model.logits(hidden), cache

    first, cache = run(ids[:, :8], empty_cache(arch, 2, 16, jnp.float32))
    second, _ = run(ids[:, 8:], cache)
    assert (
        tiny_models.difference(jnp.concatenate([first, second], axis=1), tiny_models.logits(arch, params, ids)) < 1e-5
    )


def test_rows_cut_over_a_mesh_are_refused_in_a_line() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 1, 2), sharding.AXES)
    with pytest.raises(
        UserError, match="mesh.sequence=2 cuts rows.*qwen3_5_text model's DeltaNet.*set mesh.sequence=1"
    ):
        abstract_model(configuration.from_dict({}), tiny_models.CONFIGS["qwen3_5"], mesh)


def test_work_of_a_deltanet_grows_with_the_tokens_alone() -> None:
    arch = architecture(PRESETS["qwen3.5-9b"])
    deltas = dataclasses.replace(arch, layer_kinds=arch.layer_kinds[:3])
    config = configuration.from_dict({"method": "full", "model": {"remat": "none"}})
    short, long = (step_work(deltas, config, 1, tokens, 0, 0) for tokens in (1024, 4096))
    assert long.model == pytest.approx(4 * short.model) and long.hardware == pytest.approx(4 * short.hardware)
    matrices = sum(np.prod(m.shape) * (len(m.layers) or 1) for m in deltas.modules() if m.kind == "linear")
    state = 3 * (6 * 32 * 128 * 128 + 2 * 4 * 8192)  # S^T k, k d^T, S^T q of 32 heads, and the taps
    assert short.model == pytest.approx(1024 * (6 * matrices + 3 * state)) and short.hardware > short.model


def test_inspect_knows_every_role() -> None:
    for case in CASES:
        names = architecture(tiny_models.CONFIGS[case]).layer_kinds[0].names
        roles = {field.name for field in dataclasses.fields(names) if getattr(names, field.name)}
        assert {role for role in roles if not role.endswith("norm")} <= ROLES.keys()
