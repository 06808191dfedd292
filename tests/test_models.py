"""The decoder against torch transformers: every family, both config styles, real weights, and generation."""

import functools
import io
import json
import lzma
import pathlib

import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
import tiny_models

from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.params import load_params
from tpu_tune.checkpoints.source import open_source
from tpu_tune.errors import UserError
from tpu_tune.inference.generation import Sampling, generate_ids
from tpu_tune.models import FAMILIES, Decoder, architecture

CASES = list(tiny_models.CONFIGS)
VARIANTS = [case for case in tiny_models.SELDOM if case not in tiny_models.FAMILY_CASES]


@pytest.fixture(scope="module")
def goldens():
    return np.load(io.BytesIO(lzma.decompress((tiny_models.GOLDENS / "tiny_models.npz.xz").read_bytes())))


@pytest.fixture(scope="module")
def ours():
    """Function case -> (architecture, params, logits of the case's input), each computed once."""
    known = {}

    def of(case):
        if case not in known:
            arch, params = tiny_models.load(tiny_models.CONFIGS[case])
            known[case] = arch, params, tiny_models.logits_of(case, arch, params)
        return known[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_golden(case, ours, goldens):
    assert json.loads(str(goldens[f"{case}/config"])) == json.loads(json.dumps(tiny_models.CONFIGS[case])), (
        "the table has changed: run tests/make_goldens.py"
    )
    np.testing.assert_array_equal(tiny_models.input_ids(case), goldens[f"{case}/input_ids"])
    found = ours(case)[2]
    assert found.dtype == np.float32
    assert tiny_models.difference(found[:, -make_goldens.GOLDEN_TOKENS :], goldens[f"{case}/logits"]) < 1e-4


@pytest.mark.parametrize("case", tiny_models.mostly_slow(CASES, [case for case in CASES if case not in VARIANTS]))
def test_logits_equal_torch(case, ours, tmp_path):
    pytest.importorskip("torch")
    model = tiny_models.torch_model(tiny_models.write(tmp_path, tiny_models.CONFIGS[case]))
    assert tiny_models.difference(ours(case)[2], tiny_models.torch_logits_of(case, model)) < 1e-4


@pytest.mark.slow
def test_the_table_would_notice_what_it_is_for(ours):
    """Scaling, windows and residual order change the logits, so that their cases prove something."""

    def changed(case, **changes):
        arch, params = tiny_models.load({**tiny_models.CONFIGS[case], **changes})
        found = tiny_models.logits_of(case, arch, params)
        return tiny_models.difference(found, ours(case)[2])

    assert changed("llama3", rope_scaling=None) > 1e-2
    assert changed("llama_linear", rope_scaling=None) > 1e-2
    assert changed("llama_dynamic", rope_scaling=None) > 1e-2
    assert changed("mistral_window", sliding_window=None) > 1e-2
    assert changed("qwen2_upper_windows", max_window_layers=4) > 1e-2
    assert changed("neox_sequential", use_parallel_residual=True) > 1e-2
    assert changed("gpt2", scale_attn_weights=False) > 1e-2
    assert changed("gemma2", sliding_window=20) > 1e-2
    assert changed("gemma2", attn_logit_softcapping=None) > 1e-2
    assert changed("gemma2", final_logit_softcapping=None) > 1e-2
    assert changed("gemma3", rope_scaling=None) > 1e-2
    assert changed("gemma3", rope_local_base_freq=100.0) > 1e-2
    for key in ("num_kv_shared_layers", "final_logit_softcapping", "sliding_window", "rope_parameters"):
        assert changed("gemma4_wide", **{key: {"num_kv_shared_layers": 2, "sliding_window": 20}.get(key)}) > 1e-2
    assert changed("phi3", sliding_window=None) > 1e-2
    assert changed("phi3_longrope_long", original_max_position_embeddings=32) > 1e-2
    assert changed("llama_yarn", rope_parameters=None) > 1e-2
    assert changed("qwen3_yarn", rope_scaling=None) > 1e-2
    assert changed("smollm3", no_rope_layers=[1, 1, 1, 1]) > 1e-2
    assert changed("olmo3", rope_scaling=None) > 1e-2
    assert changed("olmo3", sliding_window=20) > 1e-2
    for key in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"):
        assert changed("granite", **{key: 1.0}) > 1e-2
        assert changed("granite4", **{key: 1.0}) > 1e-2
    assert changed("glm4", partial_rotary_factor=1.0) > 1e-2
    rotary = tiny_models.CONFIGS["ministral3"]["rope_parameters"]
    assert changed("ministral3", rope_parameters={**rotary, "llama_4_scaling_beta": 0.0}) > 1e-2
    assert changed("cohere2", layer_types=["full_attention"] * 4) > 1e-2
    assert changed("cohere2", logit_scale=1.0) > 1e-2
    assert changed("exaone4", layer_types=["full_attention"] * 4) > 1e-2
    assert changed("nanochat", final_logit_softcapping=None) > 1e-2
    assert changed("t5", relative_attention_max_distance=128) > 1e-2


@pytest.mark.parametrize("case", ["llama3", "qwen2_upper_windows", "neox_parallel"])
@pytest.mark.parametrize("shard", ["50GB", "8KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_save_pretrained_writes_loads(case, shard, tied, tmp_path):
    """transformers 5 names NeoX's head lm_head in memory, writes its own config style, and leaves out a tied head."""
    pytest.importorskip("torch")
    config = {**tiny_models.CONFIGS[case], "tie_word_embeddings": tied}
    model = tiny_models.torch_model(tiny_models.write(tmp_path / "made", config))
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (shard == "8KB")
    source = open_huggingface(tmp_path / "saved")
    arch = architecture(source.config)
    assert arch.tied == tied
    ids = tiny_models.input_ids(case)
    found = tiny_models.logits(arch, load_params(source, arch), ids)
    assert tiny_models.difference(found, tiny_models.torch_logits(model, ids)) < 1e-4


@pytest.mark.parametrize(
    "case",
    tiny_models.seldom_slow([case for case in tiny_models.FAMILY_CASES if case != "llama2"] + ["t5_gated", "gemma2"]),
)
def test_save_pretrained_of_every_family_loads(case, tmp_path):
    pytest.importorskip("torch")
    model = tiny_models.torch_model(tiny_models.write(tmp_path / "made", tiny_models.CONFIGS[case]))
    model.save_pretrained(tmp_path / "saved", max_shard_size="16KB")
    source = open_huggingface(tmp_path / "saved")
    arch = architecture(source.config)
    found = tiny_models.logits_of(case, arch, load_params(source, arch))
    assert tiny_models.difference(found, tiny_models.torch_logits_of(case, model)) < 1e-4


_LLAMA_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_GPT_KEYS = ("vocab_size", "n_embd", "n_layer", "n_head")
REQUIRED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gpt_neox"), (*_LLAMA_KEYS, "num_key_value_heads")),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "phi"), (*_LLAMA_KEYS, "num_key_value_heads")),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), (*_LLAMA_KEYS, "num_key_value_heads", "head_dim")),
    **dict.fromkeys(
        (
            "phi3",
            "smollm3",
            "olmo2",
            "olmo3",
            "granite",
            "glm",
            "glm4",
            "ministral3",
            "cohere",
            "cohere2",
            "seed_oss",
            "exaone4",
            "nanochat",
            "qwen3_5_text",
            "qwen3_5_moe_text",
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "olmoe",
            "granitemoe",
            "granitemoeshared",
            "glm4_moe",
            "gpt_oss",
        ),
        (*_LLAMA_KEYS, "num_key_value_heads", "pad_token_id"),
    ),  # fmt: skip
    "qwen3_next": (*_LLAMA_KEYS, "num_key_value_heads", "num_experts"),
    "granitemoehybrid": (*_LLAMA_KEYS, "num_key_value_heads", "num_local_experts", "layer_types", "mamba_n_heads"),
    **dict.fromkeys(("gptj", "gpt2"), (*_GPT_KEYS, "rotary_dim")),
    "opt": ("vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "word_embed_proj_dim"),
    "t5": ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
}


def test_every_family_is_in_the_tables():
    cases = {tiny_models.CONFIGS[case]["model_type"] for case in tiny_models.FAMILY_CASES}
    assert cases == set(FAMILIES) == set(REQUIRED)


@pytest.mark.parametrize("family", REQUIRED)
def test_a_config_without_optional_keys_means_what_transformers_says(family):
    """Old config files leave keys out; transformers' defaults are then part of the format."""
    pytest.importorskip("torch")  # the configs themselves need none, but some import it
    from transformers import AutoConfig

    case = next(case for case in tiny_models.FAMILY_CASES if tiny_models.CONFIGS[case]["model_type"] == family)
    bare = {key: value for key, value in tiny_models.CONFIGS[case].items() if key in REQUIRED[family]}
    full = AutoConfig.for_model(family, **bare).to_dict()
    assert architecture({"model_type": family, **bare}) == architecture(full)


def test_what_is_not_known_is_named():
    with pytest.raises(
        UserError, match="model_type 'lama' is not known.*did you mean 'llama'.*llama, mistral, qwen2, qwen3, gpt_neox"
    ):
        architecture({"model_type": "lama"})
    config = tiny_models.CONFIGS["llama2"]
    with pytest.raises(
        UserError,
        match="rope type 'axial' is not implemented.*default, linear, dynamic, llama3, yarn, longrope, proportional",
    ):
        architecture({**config, "rope_scaling": {"rope_type": "axial", "factor": 2.0}})
    for kind, near in (("qwen4", "qwen3"), ("gemma5", "gemma"), ("falcon", "llama")):
        with pytest.raises(UserError, match=f"'{kind}' is not known.*'{near}'.*; the known"):
            architecture({**config, "model_type": kind})
    for case, change, says in (
        ("cohere", {"use_qk_norm": True}, "'use_qk_norm' is set in the config of this cohere model"),
        ("granite4", {"num_local_experts": 4}, "num_local_experts is 4 .* experts are not implemented"),
        ("qwen3_5", {"linear_num_value_heads": 5}, "linear_num_value_heads=5 is no multiple of linear_num_key_heads=2"),
        ("gemma4", {"num_kv_shared_layers": 5}, "num_kv_shared_layers=5 of 6 layers leaves no layer to share with"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all' .* not implemented"),
        ("gemma4", {"per_layer_config": {"0": {"window": 2}}}, "per_layer_config sets window of layer 0"),
        ("granite4", {"layer_types": None, "layers_block_type": ["mamba", "attention"]}, "layers of the type 'mamba'"),
    ):
        with pytest.raises(UserError, match=says):
            architecture({**tiny_models.CONFIGS[case], **change})
    with pytest.raises(UserError, match="activation 'mish' is not known.*gelu.*silu"):
        architecture({**config, "hidden_act": "mish"})
    with pytest.raises(UserError, match="lacks the key 'hidden_size'"):
        architecture({key: value for key, value in config.items() if key != "hidden_size"})


@pytest.mark.parametrize("case", ["llama3", "qwen2_upper_windows", "neox_parallel", "gemma2", "gemma3", "t5"])
def test_remat_and_blockwise_attention_change_nothing(case, ours):
    arch, params, expected = ours(case)
    found = tiny_models.logits_of(case, arch, params, remat="full", attention="blockwise")
    assert tiny_models.difference(found, expected) < 1e-5


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(arch, params, ids, positions, segments, targets):
    """Return ((summed cross-entropy, logits), gradients of all weights)."""

    def loss(params):
        logits = Decoder(arch, params)(ids, positions, segments)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(targets >= 0, chosen, 0.0)), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("case", tiny_models.seldom_slow([case for case in tiny_models.FAMILY_CASES if case != "t5"]))
def test_a_packed_row_is_its_documents(case, ours):
    """Logits, loss and all gradients of a row of two documents are those of the documents, each in a row of its own."""
    arch, params, _ = ours(case)
    first, second = (list(tiny_models.input_ids(name, 1, length)[0]) for name, length in (("a", 8), ("b", 12)))

    def rows(*rows):  # of one shape, for one compilation: (tokens, positions, segments, targets)
        parts = [
            [part + [fill] * (20 - len(part)) for part, fill in zip(row, (0, 0, 0, -1), strict=True)] for row in rows
        ]
        return [jnp.asarray(part) for part in zip(*parts, strict=True)]

    first, second = ((text, [*range(len(text))], [1] * len(text), [*text[1:], -1]) for text in (first, second))
    joined = [*map(list.__add__, first[:2], second[:2]), first[2] + [2] * 12, first[3] + second[3]]
    (loss, logits), gradients = loss_and_gradients(arch, params, *rows(joined, ([], [], [], [])))
    (expected, apart), expected_gradients = loss_and_gradients(arch, params, *rows(first, second))
    assert tiny_models.difference(logits[0, :8], apart[0, :8]) < 1e-5
    assert tiny_models.difference(logits[0, 8:], apart[1, :12]) < 1e-5
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # A bias of all keys shifts a query's scores alike: without rotary positions its gradient is rounding alone.
    least = max(np.abs(gradient).max() for gradient in expected_gradients.values()) / 100
    for path, gradient in expected_gradients.items():
        difference = np.abs(gradients[path] - gradient).max()
        assert difference < 2e-5 * max(least, np.abs(gradient).max()), path


@pytest.mark.parametrize("case", tiny_models.seldom_slow([*tiny_models.FAMILY_CASES, "t5_gated", "gemma4_wide"]))
def test_generation_with_a_cache_equals_recomputing(case, ours):
    """Prompts of different lengths, shorter and longer than the windows; greedy: each token is the recomputed best."""
    arch, params, _ = ours(case)
    prompts = [[int(token) for token in tiny_models.input_ids(case, 1, length)[0]] for length in (3, 11, 7)]
    answers = generate_ids(arch, params, prompts, Sampling(max_new_tokens=9), [], jnp.float32)
    starts, encoder = prompts, None
    if arch.encoder:
        starts = [[arch.start_token]] * len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts])
        encoder = padded(prompts), np.arange(TEXT)[None] < lengths[:, None]
    # Causal: a token's scores are those of the text up to it, whatever stands behind.
    rows = tiny_models.logits(arch, params, padded(map(list.__add__, starts, answers)), encoder)
    for start, answer, row in zip(starts, answers, rows, strict=True):
        assert len(answer) == 9
        for token, scores in zip(answer, row[len(start) - 1 :], strict=False):
            assert scores[token] >= scores.max() - 1e-4 * np.abs(scores).max()


def padded(rows):
    """Return (rows, TEXT) token ids, zeros behind each row."""
    return np.array([[*row, *[0] * (TEXT - len(row))] for row in rows])


TEXT = 24


def test_generation_stops_at_the_end_token_of_each_row(ours):
    arch, params, _ = ours("llama2")
    prompts = [[5, 6, 7], [8, 9]]
    free = generate_ids(arch, params, prompts, Sampling(max_new_tokens=9), [], jnp.float32)
    end = free[0][4]
    stopped = generate_ids(arch, params, prompts, Sampling(max_new_tokens=9), [end], jnp.float32)
    assert stopped == [answer[: answer.index(end)] if end in answer else answer for answer in free]


def test_dynamic_rope_looks_at_the_text_not_at_the_cache(ours):
    """A short prompt in a long cache keeps its trained angles, as in transformers."""
    config = {**tiny_models.CONFIGS["llama_dynamic"], "max_position_embeddings": 32}
    arch, params = tiny_models.load(config)
    prompt = [int(token) for token in tiny_models.input_ids("dynamic", 1, 6)[0]]
    answer = generate_ids(arch, params, [prompt], Sampling(max_new_tokens=8), [], jnp.float32)[0]
    text = list(prompt)
    for token in answer:
        row = np.asarray(Decoder(arch, params)(jnp.asarray([text + [0] * (TEXT - len(text))])))[0, len(text) - 1]
        assert row[token] >= row.max() - 1e-4
        text.append(token)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    source = open_source(str(smollm2_gguf))
    arch = architecture(source.config)
    return arch, load_params(source, arch), smollm2_gguf


def test_smollm2_equals_the_golden(smollm2):
    arch, params, _ = smollm2
    golden = np.load(tiny_models.GOLDENS / "smollm2.npz")
    found = tiny_models.logits(arch, params, golden["input_ids"])[0]
    difference = np.abs(found[-4:, make_goldens.SMOLLM2_VOCABULARY] - golden["logits"]).max()
    assert difference / golden["largest"] < 1e-4
    assert abs(np.abs(found).max() / golden["largest"] - 1) < 1e-4
    np.testing.assert_array_equal(found.argmax(-1), golden["best"])


def test_smollm2_equals_torch(smollm2):
    pytest.importorskip("torch")
    arch, params, path = smollm2
    ids = np.array([make_goldens.SMOLLM2_TEXT_IDS])
    expected = tiny_models.torch_logits(make_goldens.torch_smollm2(path), ids)
    assert tiny_models.difference(tiny_models.logits(arch, params, ids), expected) < 1e-4


def test_goldens_are_small():
    assert sum(file.stat().st_size for file in pathlib.Path(tiny_models.GOLDENS).iterdir()) < 500_000
