"""GGUF files of every further family: names, shapes, values and configuration come back as Hugging Face has them.

The files are written here as llama.cpp's converter writes them: GGUF's names from the `gguf` package's own maps, values
and metadata as conversion/gemma.py, gpt2.py, phi.py and t5.py have them. What Hugging Face calls the tensors is listed
here and held against torch's models where torch is installed.
"""

import dataclasses
import functools

import gguf
import numpy as np
import pytest

from tpu_tune.checkpoints.gguf import open_gguf
from tpu_tune.checkpoints.gguf_families import FAMILIES
from tpu_tune.checkpoints.gguf_file import open_gguf_file
from tpu_tune.errors import UserError

V, D, F, H, K, HD, N = 40, 64, 96, 4, 2, 16, 2  # vocabulary, width, MLP, heads, kv heads, head, layers
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
DECODER = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": N, "num_attention_heads": H,
    "num_key_value_heads": K, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
ATTENTION = {f"self_attn.{part}_proj": (heads * HD, D) for part, heads in (("q", H), ("k", K), ("v", K))}
ATTENTION["self_attn.o_proj"] = (D, H * HD)
GATED = {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
GEMMA = ATTENTION | GATED | {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
GEMMA2 = GEMMA | {"pre_feedforward_layernorm": (D,), "post_feedforward_layernorm": (D,)}
GEMMA3 = GEMMA2 | {"self_attn.q_norm": (HD,), "self_attn.k_norm": (HD,)}
OLMO = ATTENTION | GATED | {"post_attention_layernorm": (D,), "post_feedforward_layernorm": (D,)}
GLM = ATTENTION | {"mlp.gate_up_proj": (2 * F, D), "mlp.down_proj": (D, F)}
GLM |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
LLAMA_ENDS = {"model.embed_tokens": (V, D), "model.norm": (D,)}
PHI = {f"self_attn.{part}": (D, D) for part in ("q_proj", "k_proj", "v_proj", "dense")}
PHI |= {"mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D), "input_layernorm": (D,)}
PHI3 = {
    "self_attn.qkv_proj": ((H + 2 * K) * HD, D), "self_attn.o_proj": (D, D), "mlp.gate_up_proj": (2 * F, D),
    "mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,),
}  # fmt: skip
GPT2 = {  # (in, out), except the norms
    "ln_1": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "ln_2": (D,), "mlp.c_fc": (D, F),
    "mlp.c_proj": (F, D),
}  # fmt: skip
T5 = {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": F, "num_layers": 3, "num_heads": H, "n_positions": 128}


def decoder(prefix, layer, ends, biased=False):
    """All tensors of a model whose layers are alike: Hugging Face name -> shape."""
    modules = {f"{prefix}.{index}.{name}": shape for index in range(N) for name, shape in layer.items()} | ends
    tensors = {f"{name}.weight": shape for name, shape in modules.items()}
    if biased:
        for name, shape in modules.items():
            if not name.endswith(("embed_tokens", "wte", "wpe")):
                tensors[f"{name}.bias"] = shape[-1:] if prefix == "transformer.h" else shape[:1]
    return tensors


def qkv_biases(*more):
    """Biases of q, k and v, and of more modules of width D."""
    sizes = {f"self_attn.{part}_proj": ATTENTION[f"self_attn.{part}_proj"][0] for part in "qkv"} | dict.fromkeys(
        more, D
    )
    return {f"model.layers.{layer}.{name}.bias": (size,) for layer in range(N) for name, size in sizes.items()}


def t5(mlp, decoder_layers, head):
    tensors = {"shared.weight": (V, D)} | ({"lm_head.weight": (V, D)} if head else {})
    for stack, layers in (("encoder", 3), ("decoder", decoder_layers)):
        sublayers = ["SelfAttention", *["EncDecAttention"] * (stack == "decoder")]
        tensors[f"{stack}.final_layer_norm.weight"] = (D,)
        tensors[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, H)
        for layer in range(layers):
            place = f"{stack}.block.{layer}.layer"
            for number, name in enumerate(sublayers):
                for part in "qkvo":
                    shape = (D, H * 8) if part == "o" else (H * 8, D)
                    tensors[f"{place}.{number}.{name}.{part}.weight"] = shape
            for number in range(len(sublayers) + 1):
                tensors[f"{place}.{number}.layer_norm.weight"] = (D,)
            for name in mlp:
                shape = (D, F) if name == "wo" else (F, D)
                tensors[f"{place}.{len(sublayers)}.DenseReluDense.{name}.weight"] = shape
    return tensors


@dataclasses.dataclass(frozen=True)
class Case:
    """One family or variant.

    Attributes:
      architecture: GGUF's.
      model_type: Hugging Face's, of `config`.
      config: of transformers' config class.
      tensors: Hugging Face name -> shape.
      metadata: what the converter writes beyond the keys that `config` gives at once; keys without the prefix.
      change: what the converter does to a tensor.
    """

    architecture: str
    model_type: str
    config: dict
    tensors: dict
    metadata: dict
    change: object = lambda name, tensor: tensor


def plus_one(name, tensor):
    """conversion/gemma.py, `modify_tensors`."""
    return tensor + 1 if name.endswith("norm.weight") else tensor


def permuted(name, tensor):
    """conversion/llama.py, `permute`."""
    heads = H if ".q_proj." in name else K if ".k_proj." in name else 0
    if not heads:
        return tensor
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def conv1d(name, tensor):
    """conversion/gpt2.py, `modify_tensors`."""
    return tensor.T if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else tensor


RMS = {"attention.layer_norm_rms_epsilon": 1e-6}
GEMMA_KEYS = RMS | {"attention.key_length": HD, "attention.value_length": HD}
SHORT, LONG = [1.0, 1.125, 1.25, 1.5, 1.75, 2.0], [1.0, 2.0, 3.0, 5.0, 7.0, 9.0]
YARN = {"factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"rope_type": "yarn", "rope_theta": 5e5}
YARN_KEYS = {
    "rope.freq_base": 5e5, "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 16, "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}  # fmt: skip
GRANITE_SCALES = {
    "attention.scale": 0.125, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0,
}  # fmt: skip
WHOLE_HEAD = {"rope.dimension_count": HD}
COHERE_KEYS = WHOLE_HEAD | {
    "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.25, "rope.freq_base": 5e5, "rope.scaling.type": "none"
}  # fmt: skip
COHERE = {key: size for key, size in GEMMA.items() if key != "post_attention_layernorm"}
CASES = {
    "smollm3": Case(
        "smollm3",
        "smollm3",
        DECODER | {"rope_parameters": ROTARY | {"rope_theta": 5e6}},
        decoder("model.layers", GEMMA, LLAMA_ENDS),
        RMS | WHOLE_HEAD | {"rope.freq_base": 5e6},
        permuted,
    ),
    "llama-yarn": Case(
        "llama",
        "llama",
        DECODER | {"rope_parameters": YARN},
        decoder("model.layers", GEMMA, LLAMA_ENDS | {"lm_head": (V, D)}),
        RMS | WHOLE_HEAD | YARN_KEYS,
        permuted,
    ),
    "olmo2": Case(
        "olmo2",
        "olmo2",
        DECODER,
        decoder(
            "model.layers",
            OLMO | {"self_attn.q_norm": (H * HD,), "self_attn.k_norm": (K * HD,)},
            LLAMA_ENDS | {"lm_head": (V, D)},
        ),
        {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0},
    ),
    "olmo3": Case(
        "olmo2",
        "olmo3",
        DECODER
        | {
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": ROTARY | {"rope_theta": 5e5},
            },
        },
        decoder(
            "model.layers",
            OLMO | {"self_attn.q_norm": (H * HD,), "self_attn.k_norm": (K * HD,)},
            LLAMA_ENDS | {"lm_head": (V, D)},
        ),
        {"attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": 32, "rope.freq_base_swa": 5e5}
        | {"attention.sliding_window_pattern": [True, False]}
        | YARN_KEYS,
    ),
    "granite": Case(
        "granite",
        "granite",
        DECODER
        | {
            "attention_multiplier": 0.125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.25,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        decoder("model.layers", GEMMA, LLAMA_ENDS) | qkv_biases("self_attn.o_proj"),
        RMS | WHOLE_HEAD | GRANITE_SCALES | {"rope.freq_base": 10000.0},
        permuted,
    ),
    "glm": Case(
        "chatglm",
        "glm",
        DECODER | {"head_dim": HD, "attention_bias": False},
        decoder("model.layers", GLM, LLAMA_ENDS | {"lm_head": (V, D)}),
        {"attention.layer_norm_rms_epsilon": 1.5625e-07, "rope.dimension_count": 8, "attention.key_length": HD},
    ),
    "glm4": Case(
        "glm4",
        "glm4",
        DECODER | {"head_dim": HD, "rope_parameters": ROTARY | {"partial_rotary_factor": 0.25}},
        decoder(
            "model.layers",
            GLM | {"post_self_attn_layernorm": (D,), "post_mlp_layernorm": (D,)},
            LLAMA_ENDS | {"lm_head": (V, D)},
        )
        | qkv_biases(),
        {"attention.layer_norm_rms_epsilon": 1.5625e-07, "rope.dimension_count": 4, "attention.key_length": HD},
    ),
    "ministral3": Case(
        "mistral3",
        "ministral3",
        DECODER
        | {
            "head_dim": HD,
            "rope_parameters": YARN
            | {"beta_fast": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.125},
        },
        decoder("model.layers", GEMMA, LLAMA_ENDS | {"lm_head": (V, D)}),
        {"attention.layer_norm_rms_epsilon": 1e-5, "attention.key_length": HD, "attention.temperature_scale": 0.125}
        | WHOLE_HEAD
        | YARN_KEYS
        | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_log_multiplier": 1.0},
        permuted,
    ),
    "cohere": Case(
        "command-r",
        "cohere",
        DECODER | {"logit_scale": 0.25, "rope_parameters": ROTARY | {"rope_theta": 5e5}},
        decoder("model.layers", COHERE, LLAMA_ENDS),
        COHERE_KEYS,
    ),
    "cohere2": Case(
        "cohere2",
        "cohere2",
        DECODER | {"logit_scale": 0.25, "sliding_window": 32, "rope_parameters": ROTARY | {"rope_theta": 5e5}},
        decoder("model.layers", COHERE, LLAMA_ENDS),
        COHERE_KEYS | {"attention.sliding_window": 32},
    ),
    "seed_oss": Case(
        "seed_oss",
        "seed_oss",
        DECODER | {"head_dim": HD},
        decoder("model.layers", GEMMA, LLAMA_ENDS | {"lm_head": (V, D)}) | qkv_biases(),
        RMS | {"attention.key_length": HD, "rope.freq_base": 10000.0},
    ),
    "exaone4": Case(
        "exaone4",
        "exaone4",
        DECODER
        | {
            "sliding_window": None,
            "sliding_window_pattern": None,
            "layer_types": ["full_attention"] * N,
            "tie_word_embeddings": True,
        },
        decoder("model.layers", OLMO | {"self_attn.q_norm": (HD,), "self_attn.k_norm": (HD,)}, LLAMA_ENDS),
        {"attention.layer_norm_rms_epsilon": 1e-5},
    ),
    "exaone4-32b": Case(
        "exaone4",
        "exaone4",
        DECODER | {"num_hidden_layers": 64, "sliding_window_pattern": 4, "tie_word_embeddings": True},
        {"model.embed_tokens.weight": (V, D)},
        {"attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": 4096}
        | {"attention.sliding_window_pattern": [(layer + 1) % 4 != 0 for layer in range(64)]},
    ),
    "gpt2": Case(
        "gpt2",
        "gpt2",
        {"vocab_size": V, "n_embd": D, "n_layer": N, "n_head": H, "n_positions": 128, "n_inner": F},
        decoder(
            "transformer.h",
            GPT2,
            {"transformer.wte": (V, D), "transformer.wpe": (128, D), "transformer.ln_f": (D,)},
            True,
        ),
        {
            "context_length": 128,
            "embedding_length": D,
            "feed_forward_length": 4 * D,
            "block_count": N,
            "attention.head_count": H,
            "attention.layer_norm_epsilon": 1e-5,
        },
        conv1d,
    ),
    "gemma": Case(
        "gemma", "gemma", DECODER | {"head_dim": HD}, decoder("model.layers", GEMMA, LLAMA_ENDS), GEMMA_KEYS, plus_one
    ),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        DECODER
        | {
            "head_dim": HD,
            "query_pre_attn_scalar": HD,
            "sliding_window": 32,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        decoder("model.layers", GEMMA2, LLAMA_ENDS),
        GEMMA_KEYS | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "attention.sliding_window": 32},
        plus_one,
    ),
    "gemma2-27b": Case(
        "gemma2",
        "gemma2",
        DECODER | {"head_dim": 8, "query_pre_attn_scalar": D // H, "num_hidden_layers": 46},
        {"model.embed_tokens.weight": (V, D)},
        GEMMA_KEYS
        | {
            "attention.key_length": 8,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 4096,
        },
        plus_one,
    ),
    "gemma3": Case(
        "gemma3",
        "gemma3_text",
        DECODER
        | {
            "head_dim": HD,
            "query_pre_attn_scalar": HD,
            "sliding_window": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            },
        },
        decoder("model.layers", GEMMA3, LLAMA_ENDS),
        GEMMA_KEYS
        | {
            "attention.sliding_window": 32,
            "rope.freq_base": 5e5,
            "rope.freq_base_swa": 20000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        plus_one,
    ),
    "gemma3-plain": Case(  # as files converted before rope.freq_base_swa existed
        "gemma3",
        "gemma3_text",
        DECODER | {"head_dim": HD, "query_pre_attn_scalar": HD, "sliding_window": 32, "num_hidden_layers": 7},
        {"model.embed_tokens.weight": (V, D)},
        GEMMA_KEYS | {"attention.sliding_window": 32, "rope.freq_base": 1e6},
        plus_one,
    ),
    "phi": Case(
        "phi2",
        "phi",
        DECODER
        | {
            "num_key_value_heads": H,
            "intermediate_size": 4 * D,
            "rope_parameters": ROTARY | {"partial_rotary_factor": 0.5},
        },
        decoder(
            "model.layers", PHI, {"model.embed_tokens": (V, D), "model.final_layernorm": (D,), "lm_head": (V, D)}, True
        ),
        {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8, "feed_forward_length": 4 * D},
    ),
    "phi3": Case(
        "phi3",
        "phi3",
        DECODER | {"original_max_position_embeddings": 128, "sliding_window": 32, "partial_rotary_factor": 1.0},
        decoder("model.layers", PHI3, LLAMA_ENDS | {"lm_head": (V, D)}),
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": HD,
            "rope.freq_base": 10000.0,
            "rope.scaling.original_context_length": 128,
            "attention.sliding_window": 32,
        },
    ),
    "phi3-long": Case(
        "phi3",
        "phi3",
        DECODER
        | {
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "rope_parameters": ROTARY
            | {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "partial_rotary_factor": 0.75},
        },
        decoder("model.layers", PHI3, LLAMA_ENDS),
        {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": 12,
            "rope.freq_base": 10000.0,
            "rope.scaling.original_context_length": 64,
            "attention.sliding_window": 0,
            "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(2) / np.log(64))),
        },
    ),
    "t5": Case("t5", "t5", T5, t5(("wi", "wo"), 3, head=False), {"attention.head_count": H}),
    "flan-t5": Case(
        "t5",
        "t5",
        T5 | {"num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        t5(("wi_0", "wi_1", "wo"), 2, head=True),
        {"decoder_block_count": 2},
    ),
}
T5_KEYS = {
    "context_length": 128, "embedding_length": D, "feed_forward_length": F, "block_count": 3, "attention.head_count": H,
    "attention.key_length": 8, "attention.value_length": 8, "attention.layer_norm_epsilon": 1e-6,
    "attention.layer_norm_rms_epsilon": 1e-6, "attention.relative_buckets_count": 32, "decoder_start_token_id": 0,
}  # fmt: skip


def keys(case):
    """The metadata that the converter writes for a case."""
    if case.architecture == "gpt2":
        return case.metadata
    if case.architecture == "t5":
        return T5_KEYS | case.metadata
    config = case.config
    return {
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": F,
        "block_count": config["num_hidden_layers"],
        "attention.head_count": H,
        "attention.head_count_kv": config["num_key_value_heads"],
    } | case.metadata


@functools.cache
def name_map(architecture):
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    return gguf.get_tensor_name_map(kind, 3)


def gguf_name(case, name):
    """The `gguf` package's own name for a Hugging Face tensor."""
    return name_map(case.architecture).get_name(name, try_suffixes=(".weight", ".bias"))


def write(path, case, extra=()):
    """Write a random model of a case; return its tensors by Hugging Face name.

    Values are multiples of 1/256, so that adding one and taking it away again is exact.
    """
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, case.architecture)
    for key, value in keys(case).items():
        kind = {int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
        getattr(writer, f"add_{kind}")(f"{case.architecture}.{key}", value)
    tensors = {}
    for name, shape in case.tensors.items():
        tensors[name] = random.integers(-64, 64, shape).astype(np.float32) / 256
        writer.add_tensor(gguf_name(case, name), np.ascontiguousarray(case.change(name, tensors[name])))
    if "rope.dimension_count" in case.metadata and case.metadata["rope.dimension_count"] == 12:
        writer.add_tensor("rope_factors_long.weight", np.array(LONG, np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(SHORT, np.float32))
    for name, value in extra:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


WHOLE = [name for name, case in CASES.items() if len(case.tensors) > 1]


@pytest.mark.parametrize("name", WHOLE)
def test_weights_come_back_as_hugging_face_has_them(tmp_path, name):
    tensors = write(tmp_path / "m.gguf", CASES[name])
    source = open_gguf(tmp_path / "m.gguf")
    assert source.shapes == {key: tensor.shape for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(key), tensor, err_msg=key)


def transformers_config(name):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[CASES[name].model_type](**CASES[name].config)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore")
def test_the_names_and_shapes_are_those_that_torch_saves(tmp_path, name):
    pytest.importorskip("torch")
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if name.endswith("t5") else AutoModelForCausalLM
    auto.from_config(transformers_config(name)).save_pretrained(tmp_path)
    saved = {key: tensor.shape for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    if name == "flan-t5":  # transformers 5 ties every T5 and then leaves the head out; the published files have it
        saved["lm_head.weight"] = (V, D)
    assert CASES[name].tensors == saved


# What GGUF does not hold: training's settings, and names that only say where a config came from.
NOT_MODEL = (
    "initializer", "drop", "_token_id", "architectures", "summary", "cache", "bidirectional", "sliding_window_pattern",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_config_means_the_same_to_transformers(tmp_path, name):
    from transformers import CONFIG_MAPPING

    write(tmp_path / "m.gguf", CASES[name])
    config = open_gguf(tmp_path / "m.gguf").config
    assert config["model_type"] == CASES[name].model_type
    found = CONFIG_MAPPING[config["model_type"]](**config).to_dict()
    expected = transformers_config(name).to_dict()
    for key, value in expected.items():
        if not any(part in key for part in NOT_MODEL):
            close = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert found.get(key) == close, key


def test_gemma3s_config_is_written_out(tmp_path):
    """The older of the two styles, as the published models have it."""
    write(tmp_path / "m.gguf", CASES["gemma3-plain"])
    config = open_gguf(tmp_path / "m.gguf").config
    assert (config["rope_theta"], config["rope_local_base_freq"], config["rope_scaling"]) == (1e6, 10000.0, None)
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert config["query_pre_attn_scalar"] == HD and config["hidden_activation"] == "gelu_pytorch_tanh"
    assert config["tie_word_embeddings"] and config["final_logit_softcapping"] is None


def test_without_a_window_every_gemma3_layer_sees_all(tmp_path):
    case = CASES["gemma3-plain"]
    metadata = {key: value for key, value in case.metadata.items() if key != "attention.sliding_window"}
    write(tmp_path / "m.gguf", dataclasses.replace(case, metadata=metadata))
    assert set(open_gguf(tmp_path / "m.gguf").config["layer_types"]) == {"full_attention"}


def test_t5s_config(tmp_path):
    write(tmp_path / "m.gguf", CASES["t5"])
    config = open_gguf(tmp_path / "m.gguf").config
    assert config["tie_word_embeddings"] and config["feed_forward_proj"] == "relu"
    write(tmp_path / "m.gguf", CASES["flan-t5"], [("dec.blk.0.cross_attn_rel_b.weight", np.ones((32, H), np.float32))])
    source = open_gguf(tmp_path / "m.gguf")
    assert not source.config["tie_word_embeddings"] and source.config["feed_forward_proj"] == "gated-gelu"
    assert source.config["decoder_start_token_id"] == 0 and source.config["num_decoder_layers"] == 2
    assert source.shapes.keys() == CASES["flan-t5"].tensors.keys()  # T5's old cross attention bias is not used


def test_a_bias_in_every_layer_is_named(tmp_path):
    write(tmp_path / "m.gguf", CASES["t5"], [("enc.blk.1.attn_rel_b.weight", np.ones((32, H), np.float32))])
    with pytest.raises(UserError, match=r"m\.gguf: has a relative position bias in every layer \(UMT5\)"):
        open_gguf(tmp_path / "m.gguf")


def test_another_attention_factor_is_kept(tmp_path):
    case = CASES["phi3-long"]
    write(tmp_path / "m.gguf", dataclasses.replace(case, metadata=case.metadata | {"rope.scaling.attn_factor": 1.5}))
    assert open_gguf(tmp_path / "m.gguf").config["rope_scaling"]["attention_factor"] == 1.5


@pytest.mark.parametrize("name", WHOLE)
def test_writing_is_the_inverse_of_reading(tmp_path, name):
    """Names and values that `store` and the name table give are those that the converter wrote."""
    case = CASES[name]
    write(tmp_path / "m.gguf", case)
    file, family = open_gguf_file(tmp_path / "m.gguf"), FAMILIES[case.architecture]
    source = open_gguf(tmp_path / "m.gguf")
    for key, shape in source.shapes.items():
        stored = family.to_gguf(key, source.read(key), source.config)
        assert stored.shape == family.shape(key, shape)
        np.testing.assert_array_equal(stored, case.change(key, source.read(key)))
        assert family.gguf_name(key, source.shapes) == gguf_name(case, key)
    assert len(source.shapes) == len([key for key in file.tensors if "rope_factors" not in key])


# The real file


@pytest.mark.slow
def test_gemma3_reads_as_the_gguf_package_reads_it(gemma3_gguf):
    source = open_gguf(gemma3_gguf)
    assert source.config["model_type"] == "gemma3_text" and source.config["num_hidden_layers"] == 18
    assert source.config["sliding_window"] == 512 and source.config["layer_types"].count("full_attention") == 3
    assert sum(int(np.prod(shape)) for shape in source.shapes.values()) == 268_098_176
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(gemma3_gguf).tensors}
    pairs = {
        "blk.3.ffn_down": ("model.layers.3.mlp.down_proj", 0),
        "blk.17.attn_q": ("model.layers.17.self_attn.q_proj", 0),
        "blk.5.post_ffw_norm": ("model.layers.5.post_feedforward_layernorm", 1),
        "blk.5.attn_q_norm": ("model.layers.5.self_attn.q_norm", 1),
    }
    for name, (original, added) in pairs.items():
        tensor = stored[f"{name}.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(source.read(f"{original}.weight") + np.float32(added), expected)
