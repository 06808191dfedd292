"""What Gemma 4 alone has: layers that use others' keys and values, and a number that training leaves alone."""

from __future__ import annotations

import pathlib
from typing import Any

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from tpu_tune.checkpoints.params import check_names, load_params
from tpu_tune.errors import UserError
from tpu_tune.models import architecture, empty_cache
from tpu_tune.models.groups import LayerGroup

CASE = "gemma4_wide"
WIDTH, STEPS = 20, 2


def test_layers_that_share_keep_no_keys_and_values_of_their_own():
    arch = architecture(tiny_models.CONFIGS[CASE])
    assert arch.groups == (LayerGroup(0, 2, 2), LayerGroup(4, 2, 2))
    assert [kind.keys_from for kind in arch.layer_kinds] == [None] * 4 + [2, 3] * 2
    own, shared = empty_cache(arch, 3, 32, jnp.float32).past
    sizes = [[array.shape for array in jax.tree.leaves(past)] for past in own]
    assert sizes == [[(2, 3, 32, 2, 8)] * 2, [(2, 3, 32, 1, 16)] * 2]  # by kind: heads of two sizes
    assert not jax.tree.leaves(shared)


def test_keys_and_values_that_no_layer_uses_are_passed_over():
    """The published files have weights for them; others that have no place are refused as ever."""
    config = tiny_models.CONFIGS[CASE]
    arch, tensors = architecture(config), tiny_models.weights(config)
    unused = {"k_proj": (16, 32), "v_proj": (16, 32), "k_norm": (8,)}
    more = {f"model.layers.4.self_attn.{name}.weight": np.ones(shape) for name, shape in unused.items()}
    assert check_names(tiny_models.source(config, tensors | more), arch).keys() == tensors.keys()
    for name in ("model.layers.3.self_attn.v_proj.weight", "model.layers.4.self_attn.sinks"):
        with pytest.raises(UserError, match=f"1 tensor is not part of a gemma4_text model: {name}"):
            check_names(tiny_models.source(config, tensors | {name: np.ones((2, 2))}), arch)


def test_a_table_of_layers_says_what_the_two_sizes_say():
    """As transformers 5.24 writes it, with the layers' numbers filled up to one length."""
    config = tiny_models._gemma4("sssssf" * 2, attention_k_eq_v=True, num_global_key_value_heads=1)
    sizes = {"head_dim": 16, "num_key_value_heads": 1}
    table = {key: value for key, value in config.items() if "global" not in key}
    assert architecture({**table, "per_layer_config": {"05": sizes, "11": sizes}}) == architecture(config)


def trained(folder: pathlib.Path, devices: int, **keys: Any) -> tuple[Any, Any, list[float]]:
    """Return (model, state, losses) after two steps."""
    if not (folder / "base").exists():
        tiny_models.write(folder / "base", tiny_models.CONFIGS[CASE])
    config = helpers.make_config(
        model__path=str(folder / "base"),
        model__dtype="float32",
        model__remat="full",
        lora__rank=4,
        lora__init_lora_weights="gaussian",
        lora__target_modules="all-linear",
        train__learning_rate=1e-3,
        train__lr_scheduler_type="constant",
        train__weight_decay=0.1,
        train__per_device_train_batch_size=8 if devices == 1 else 2,
        mesh__data=1,
        mesh__fsdp=4 if devices > 1 else 1,
        mesh__tensor=2 if devices > 1 else 1,
        **keys,
    )
    model, steps = helpers.prepare(config, STEPS, devices)
    rows = helpers.rows_of([[one] for one in helpers.documents(24, 6, WIDTH, 8, 0)], WIDTH)
    state, metrics = helpers.run_steps(model, steps, [helpers.window(rows, 1)] * STEPS)
    return model, state, [row["loss"] for row in metrics]


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"method": "full"},
        {"method": "lora"},
        {
            "method": "lora",
            "quantize__format": "nf4",
            "quantize__group_size": 16,
            "quantize__include": ["q_proj", "down_proj", "embed_tokens_per_layer"],
        },
    ],
    ids=["full", "lora", "qlora"],
)
def test_eight_devices_train_as_one(keys, tmp_path):
    (model, state, ours), (_, _, alone) = (trained(tmp_path, devices, **keys) for devices in (8, 1))
    np.testing.assert_allclose(ours, alone, rtol=1e-4)
    assert abs(ours[1] - ours[0]) > 1e-4
    if keys["method"] == "full":  # transformers has the layers' scalars as buffers
        arch = model.architecture
        before = load_params(model.source, arch)
        for path, leaf in state.trainable.items():
            assert np.array_equal(leaf, before[path]) == path.endswith("layer_scalar.weight"), path
