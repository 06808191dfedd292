"""Rotary embeddings against transformers' own tables: each kind, whole and partial heads, both styles of config."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune.models import rope

HEAD_DIM = 16
POSITIONS = np.array([[0, 1, 2, 15, 16, 40, 63, 64, 100, 127]])
_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
_FACTORS = {"short_factor": list(np.linspace(1, 2, 8)), "long_factor": list(np.linspace(1, 9, 8))}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SETTINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, partial": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic, partial": {"rope_type": "dynamic", "factor": 3.0, "partial_rotary_factor": 0.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **_LLAMA3},
    "llama3, other band": {
        "rope_type": "llama3",
        "factor": 4.0,
        **_LLAMA3,
        "low_freq_factor": 2,
        "high_freq_factor": 9,
    },
    "yarn": _YARN,
    "yarn, no factor": {**_YARN, "factor": None},
    "yarn, partial": {**_YARN, "partial_rotary_factor": 0.5},
    "yarn, whole frequencies or not": {**_YARN, "truncate": False},
    "yarn, betas": {**_YARN, "beta_fast": 4, "beta_slow": 0.5},
    "yarn, no ramp": {**_YARN, "beta_fast": 1e-9, "beta_slow": 1e-9},
    "yarn, attention_factor": {**_YARN, "attention_factor": 1.3},
    "yarn, mscale": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, half of mscale": {**_YARN, "mscale": 0.7},
    "yarn, mscale 0": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0},
    "yarn, shrunk": {**_YARN, "factor": 0.5},
    "longrope": {"rope_type": "longrope", **_FACTORS, "original_max_position_embeddings": 32},
    "longrope, factor": {"rope_type": "longrope", **_FACTORS, "original_max_position_embeddings": 32, "factor": 3.0},
    "longrope, attention_factor": {"rope_type": "longrope", **_FACTORS, "attention_factor": 1.7},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.3},
    "proportional, factor": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 4.0},
    "proportional, all": {"rope_type": "proportional"},
}


def transformers_table(config, kind, length):
    """Cosines and sines as transformers' rotary modules make them of `_compute_..._parameters`."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # A copy: transformers fills the dict in.
    theirs = LlamaConfig(**{key: dict(value) if isinstance(value, dict) else value for key, value in config.items()})
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
    angles = POSITIONS[..., None].astype(np.float32) * frequencies.numpy()
    return np.cos(angles) * factor, np.sin(angles) * factor


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_tables_are_transformers(name, old_style):
    pytest.importorskip("torch")
    settings = SETTINGS[name]
    config = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": HEAD_DIM, "max_position_embeddings": 64}
    if old_style:
        outside = {"rope_theta": 500.0, "partial_rotary_factor": settings.get("partial_rotary_factor")}
        config |= {key: value for key, value in outside.items() if value is not None}
        config["rope_scaling"] = {key: value for key, value in settings.items() if key != "partial_rotary_factor"}
    else:
        config["rope_parameters"] = {**settings, "rope_theta": 500.0}
    whole = settings["rope_type"] == "proportional"
    dim = HEAD_DIM if whole else int(HEAD_DIM * rope.partial_factor(config))
    angles = rope.tables(rope.from_config(config, dim), jnp.asarray(POSITIONS))
    for ours, theirs in zip(angles[:2], transformers_table(config, settings["rope_type"], 128), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert angles.queries is None


def test_the_length_beside_the_settings_comes_first():
    """As in Phi-3's configs, whose `original_max_position_embeddings` stands outside."""
    config = {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_scaling": _YARN}
    assert rope.from_config(config, 8).original_length == 16
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    assert rope.from_config({"max_position_embeddings": 64, "rope_scaling": dynamic}, 8).original_length == 64


def test_each_type_of_layer_has_its_own_settings():
    config = {
        "max_position_embeddings": 64,
        "rope_parameters": {"full_attention": {**_YARN, "rope_theta": 7.0}, "sliding_attention": {"rope_theta": 9.0}},
    }
    full, sliding = (rope.from_config(config, 8, layer_type=kind) for kind in ("full_attention", "sliding_attention"))
    assert (full.kind, full.theta, sliding.kind, sliding.theta) == ("yarn", 7.0, "default", 9.0)


def test_queries_grow_as_llama_4s():
    torch = pytest.importorskip("torch")
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    made = rope.from_config({"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.3}}, 8)
    theirs = get_llama_4_attn_scale(torch.tensor(POSITIONS), 0.3, 32)[:, 0, :, 0]
    np.testing.assert_allclose(rope.tables(made, jnp.asarray(POSITIONS)).queries, theirs, rtol=1e-6)


def test_clockwise_turns_back():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, POSITIONS.shape[1], 2, 8)), jnp.float32)
    forth, back = (rope.Rope(8, clockwise=clockwise) for clockwise in (False, True))
    turned = rope.rotate(x, forth, rope.tables(forth, jnp.asarray(POSITIONS)))
    np.testing.assert_allclose(rope.rotate(turned, back, rope.tables(back, jnp.asarray(POSITIONS))), x, atol=1e-5)
    assert np.abs(turned - x).max() > 0.1
