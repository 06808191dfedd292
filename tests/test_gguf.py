"""GGUF files: weights and configuration come back as they were before llama.cpp's converter.

The small files are written here as convert_hf_to_gguf.py writes them: its renaming, its permutation of q and k for
Llama, its splitting of GPT-NeoX's query_key_value.
"""

import dataclasses

import gguf
import ml_dtypes
import numpy as np
import pytest

from tpu_tune.checkpoints.gguf import open_gguf
from tpu_tune.errors import UserError

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS = 40, 64, 4, 2, 16, 96, 2

# Hugging Face name inside a layer -> (llama.cpp's, shape)
LLAMA = {
    "input_layernorm": ("attn_norm", (HIDDEN,)),
    "self_attn.q_proj": ("attn_q", (HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.k_proj": ("attn_k", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.v_proj": ("attn_v", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.o_proj": ("attn_output", (HIDDEN, HEADS * HEAD_DIM)),
    "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
    "mlp.gate_proj": ("ffn_gate", (WIDTH, HIDDEN)),
    "mlp.up_proj": ("ffn_up", (WIDTH, HIDDEN)),
    "mlp.down_proj": ("ffn_down", (HIDDEN, WIDTH)),
}
QWEN3 = LLAMA | {"self_attn.q_norm": ("attn_q_norm", (HEAD_DIM,)), "self_attn.k_norm": ("attn_k_norm", (HEAD_DIM,))}
NEOX = {
    "input_layernorm": ("attn_norm", (HIDDEN,)),
    "attention.query_key_value": ("attn_qkv", (3 * HIDDEN, HIDDEN)),
    "attention.dense": ("attn_output", (HIDDEN, HIDDEN)),
    "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
    "mlp.dense_h_to_4h": ("ffn_up", (WIDTH, HIDDEN)),
    "mlp.dense_4h_to_h": ("ffn_down", (HIDDEN, WIDTH)),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its names, which modules have biases, and what the converter does to its rows."""

    layer: dict
    ends: dict
    prefix: str
    biased: tuple = ()
    reorder: object = lambda name, tensor: tensor


def permute(name, tensor):
    """convert_hf_to_gguf.py, `LlamaModel.permute`."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def split_qkv(name, tensor):
    """convert_hf_to_gguf.py, `GPTNeoXModel.modify_tensors`."""
    if "query_key_value" not in name:
        return tensor
    heads = tensor.reshape(HEADS, 3, HIDDEN // HEADS, *tensor.shape[1:])
    return np.concatenate([heads[:, part].reshape(HIDDEN, *tensor.shape[1:]) for part in range(3)])


LLAMA_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NEOX_ENDS = {"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output"}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FAMILIES = {
    "llama": Family(LLAMA, LLAMA_ENDS, "model.layers", reorder=permute),
    "llama-biased": Family(LLAMA, LLAMA_ENDS, "model.layers", (*QKV, "self_attn.o_proj"), permute),
    "qwen2": Family(LLAMA, LLAMA_ENDS, "model.layers", QKV),
    "qwen3": Family(QWEN3, LLAMA_ENDS, "model.layers"),
    "gptneox": Family(NEOX, NEOX_ENDS, "gpt_neox.layers", tuple(NEOX), split_qkv),
}


def write_gguf(path, name, format_="F32", tied=False, metadata=()):
    """Write a random model of a family; return its tensors by Hugging Face name, before quantization."""
    family, architecture = FAMILIES[name], name.split("-")[0]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    if architecture == "gptneox":
        writer.add_layer_norm_eps(1e-5)
        writer.add_rope_dimension_count(HEAD_DIM // 4)
        writer.add_parallel_residual(False)
    else:
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(500000.0)
        writer.add_key_length(HEAD_DIM)
    for add, key, value in metadata:
        getattr(writer, f"add_{add}")(key, value)

    tensors = {}

    def add(original, stored, shape):
        tensors[original] = random.normal(size=shape).astype(np.float32)
        value = family.reorder(original, tensors[original])
        if len(shape) == 1:
            writer.add_tensor(stored, value)
        elif format_ in ("F16", "F32"):
            writer.add_tensor(stored, np.ascontiguousarray(value.astype({"F16": "f2", "F32": "f4"}[format_])))
        else:
            kind = gguf.GGMLQuantizationType[format_]
            writer.add_tensor(stored, gguf.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)

    for original, stored in family.ends.items():
        if stored != "output" or not tied:
            shape = (HIDDEN,) if stored == "output_norm" else (VOCABULARY, HIDDEN)
            add(f"{original}.weight", f"{stored}.weight", shape)
    for layer in range(LAYERS):
        for original, (stored, shape) in family.layer.items():
            add(f"{family.prefix}.{layer}.{original}.weight", f"blk.{layer}.{stored}.weight", shape)
            if original in family.biased:
                add(f"{family.prefix}.{layer}.{original}.bias", f"blk.{layer}.{stored}.bias", shape[:1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_come_back_in_hugging_face_order(tmp_path, name):
    tensors = write_gguf(tmp_path / "m.gguf", name)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.shapes == {key: tensor.shape for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        read = source.read(key)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, tensor, err_msg=key)


# Largest error of a weight of about unit size: half a step of the format over a block of 32.
@pytest.mark.parametrize(
    ("format_", "dtype", "error"),
    [
        ("F16", np.float16, 2e-3),
        ("BF16", ml_dtypes.bfloat16, 2e-2),
        ("Q8_0", np.float32, 0.02),
        ("Q4_0", np.float32, 0.6),
        ("Q4_1", np.float32, 0.3),
        ("Q5_1", np.float32, 0.15),
    ],
)
def test_number_formats(tmp_path, format_, dtype, error):
    tensors = write_gguf(tmp_path / "m.gguf", "llama", format_)
    source = open_gguf(tmp_path / "m.gguf")
    for key, tensor in tensors.items():
        read = source.read(key)
        assert read.shape == tensor.shape
        assert read.dtype == (dtype if tensor.ndim == 2 else np.float32)
        np.testing.assert_allclose(read.astype(np.float32), tensor, rtol=0, atol=error, err_msg=key)


def test_llama_config(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", tied=True, metadata=[("uint32", "tokenizer.ggml.bos_token_id", 1)])
    assert open_gguf(tmp_path / "m.gguf").config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def test_other_families_configs(tmp_path):
    types = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gptneox": "GPTNeoXForCausalLM"}
    for name, class_name in types.items():
        write_gguf(tmp_path / "m.gguf", name)
        config = open_gguf(tmp_path / "m.gguf").config
        assert config["architectures"] == [class_name]
        assert config["tie_word_embeddings"] is False
    assert config["model_type"] == "gpt_neox"
    assert config["rotary_pct"] == 0.25
    assert config["use_parallel_residual"] is False
    assert config["layer_norm_eps"] == 1e-5


def test_a_window_makes_a_llama_a_mistral(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", metadata=[("uint32", "llama.attention.sliding_window", 32)])
    config = open_gguf(tmp_path / "m.gguf").config
    assert config["model_type"] == "mistral" and config["sliding_window"] == 32


def test_linear_rope_scaling(tmp_path):
    scaling = [("string", "llama.rope.scaling.type", "linear"), ("float32", "llama.rope.scaling.factor", 4.0)]
    write_gguf(tmp_path / "m.gguf", "llama", metadata=scaling)
    assert open_gguf(tmp_path / "m.gguf").config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_llama3_rope_scaling_is_told_from_its_factors(tmp_path, factor, head_dim):
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, head_dim, 2) / head_dim)
    factors = [  # convert_hf_to_gguf.py, `LlamaModel.generate_extra_tensors`
        1.0 if length < 8192 / 4 else factor if length > 8192 else 1 / ((1 - smooth) / factor + smooth)
        for length, smooth in zip(wavelengths, (8192 / wavelengths - 1) / 3, strict=True)
    ]
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "feed_forward_length", "block_count", "head_count"):
        getattr(writer, f"add_{key}")(2 if key == "head_count" else 2 * head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_tensor("token_embd.weight", np.zeros((3, 2 * head_dim), np.float32))
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_gguf(path)
    assert list(source.shapes) == ["model.embed_tokens.weight"]
    assert source.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_fingerprint_follows_the_weights(tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama")
    write_gguf(tmp_path / "b.gguf", "llama")
    first = open_gguf(tmp_path / "a.gguf").fingerprint
    assert open_gguf(tmp_path / "b.gguf").fingerprint == first
    data = bytearray((tmp_path / "b.gguf").read_bytes())
    data[-HIDDEN * WIDTH * 4] ^= 1  # the first byte of the last tensor
    (tmp_path / "b.gguf").write_bytes(data)
    assert open_gguf(tmp_path / "b.gguf").fingerprint != first


def _patch(path, at, new):
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_bytes(b""), "0 bytes are no GGUF file"),
        (lambda path: _patch(path, 0, b"PK\3\4"), "not a GGUF file"),
        (lambda path: _patch(path, 4, b"\1\0\0\0"), "version 1 GGUF is not read; known: .* 2, 3"),
        (lambda path: _patch(path, 4, b"\0\0\0\3"), "big-endian"),
        (lambda path: path.write_bytes(path.read_bytes()[:400]), "cut short or damaged inside its header"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short: its header promises"),
        (lambda path: _patch(path, path.read_bytes().index(b"llama"), b"lambs"), "architecture 'lambs' is not known"),
        (lambda path: _patch(path, path.read_bytes().index(b"attn_output"), b"attn_inward"), "attn_inward"),
        (lambda path: _patch(path, path.read_bytes().index(b"block_count"), b"block_cOunt"), "lacks llama.block_count"),
    ],
)
def test_a_broken_file_is_named(tmp_path, damage, message):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama")
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        open_gguf(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_every_cut_of_the_header_is_noticed(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", tied=True)
    data = path.read_bytes()
    for length in range(0, 3000, 37):
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            open_gguf(path)


def test_a_part_of_a_split_file_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", metadata=[("uint16", "split.count", 3)])
    with pytest.raises(UserError, match="one of 3 parts"):
        open_gguf(tmp_path / "m.gguf")


# The real file


def test_smollm2_reads_as_the_gguf_package_reads_it(smollm2_gguf):
    source = open_gguf(smollm2_gguf)
    assert source.config["num_hidden_layers"] == 30 and source.config["tie_word_embeddings"]
    assert sum(int(np.prod(shape)) for shape in source.shapes.values()) == 134_515_008
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf).tensors}
    pairs = {"blk.3.ffn_down": "model.layers.3.mlp.down_proj", "token_embd": "model.embed_tokens"}
    for name, original in pairs.items():
        tensor = stored[f"{name}.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(source.read(f"{original}.weight"), expected)
