"""Files that others wrote, damaged: each reader says one line, or what it reads is right.

The referees of what is right: the safetensors package for its files, and the undamaged file for all others.
"""

from __future__ import annotations

import contextlib
import json
import struct

import gguf
import numpy as np
import pytest
import safetensors.numpy
from helpers_training import write_tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS

from tpu_tune.checkpoints import bitsandbytes
from tpu_tune.checkpoints.gguf import open_gguf
from tpu_tune.checkpoints.huggingface import load_tokenizer, open_huggingface, read_config, read_header
from tpu_tune.checkpoints.params import check_names, open_architecture
from tpu_tune.checkpoints.peft import read_spec
from tpu_tune.checkpoints.prequantized import as_unquantized
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.stored_tensor import read_tensor
from tpu_tune.checkpoints.vocabulary import RECORD, read_record
from tpu_tune.cli.hf.bash_script import read_script
from tpu_tune.curves.report import page
from tpu_tune.curves.runs import read_run
from tpu_tune.data import cache
from tpu_tune.data.sources import resolve
from tpu_tune.errors import UserError
from tpu_tune.inference.card import judged
from tpu_tune.models import architecture
from tpu_tune.models.families import FAMILIES
from tpu_tune.models.families.checked import _OWN_KINDS, KINDS

LLAMA = next(config for config in CONFIGS.values() if config["model_type"] == "llama")
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = st.one_of(
    st.sampled_from([None, "x", "", 1.5, 0, -1, 10**18, 10**400, float("nan"), float("inf"), [], {}, [1], {"a": 1}]),
    st.sampled_from([True, [[[]]], "gelu-gelu-gelu", ["full_attention"], {"rope_type": "longrope"}, "(", "\ud83d"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)


@contextlib.contextmanager
def one_line():
    """Whatever fails does so with one line."""
    try:
        yield
    except UserError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000


def damaged(content: bytes, edits) -> bytes:
    """Return bytes with some of them changed: (place, value) each, places counted round."""
    changed = bytearray(content)
    for place, value in edits:
        changed[place % len(changed)] = value
    return bytes(changed)


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


# --- config.json ----------------------------------------------------------------------------------------------------


@settings(QUICK, max_examples=500)
@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_a_config_with_an_odd_value(name, data):
    config = CONFIGS[name]
    key = data.draw(st.sampled_from(sorted(set(config) | set(KINDS))))
    with one_line():
        made = architecture({**config, key: data.draw(ODD)})
        assert made.num_heads % made.num_kv_heads == 0 and len(made.layer_kinds) <= 10_000
        assert all(size > 0 for size in (made.vocab_size, made.hidden_size, made.intermediate_size, made.head_dim))


@settings(QUICK, max_examples=200)
@given(st.sampled_from(["rope_parameters", "rope_scaling"]), st.sampled_from(sorted(CONFIGS)), st.data())
def test_a_config_with_odd_rotary_settings(key, name, data):
    kind = data.draw(st.sampled_from(["default", "linear", "dynamic", "llama3", "longrope"]))
    inner = st.sampled_from(
        ["factor", "rope_theta", "low_freq_factor", "original_max_position_embeddings", "short_factor", "long_factor",
         "attention_factor", "partial_rotary_factor", "type", "full_attention"]
    )  # fmt: skip
    with one_line():
        architecture({**CONFIGS[name], key: {"rope_type": kind, **data.draw(st.dictionaries(inner, ODD, max_size=3))}})


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_refuses_sizes_that_are_none(name):
    config = next(config for config in CONFIGS.values() if config["model_type"] == name)
    kinds = KINDS | _OWN_KINDS.get(name, {})
    sizes = [key for key in config if key in kinds and kinds[key].words.startswith("a whole number from 1 ")]
    assert len(sizes) >= 4
    for key in sizes:
        for value in ("8", 8.5, 0, -8, 10**18, [8], True, float("nan")):
            with pytest.raises(UserError, match=f"'{key}' is .*; it must be a whole number"):
                architecture({**config, key: value})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' is 'false'; it must be true or false or null"),
        ({"layer_types": ["full_attention"]}, "'layer_types' has 1 entries for num_hidden_layers=2"),
        ({"layer_types": ["full", "full"]}, "every entry is one of full_attention, sliding_attention"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key and value heads"),
        ({"head_dim": 7}, "it rotates 7 elements of each head of 7"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
        ({"rope_theta": -1}, "'rope_theta' is -1; it must be a finite number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling in the config of this llama model: 'fact"),
        ({"eos_token_id": ["</s>"]}, "'eos_token_id' is ['</s>']"),
        ({"hidden_act": "a\nb\u2028c"}, "activation 'a b c' is not known"),  # one line, whatever it quotes
    ],
)
def test_what_a_config_is_refused_for(change, says):
    with pytest.raises(UserError) as error:
        architecture({**LLAMA, **change})
    assert says in str(error.value)


def test_json_that_is_nested_too_deep_or_has_endless_numbers(tmp_path):
    for text in ("[" * 50_000, '{"model_type": ' + "[" * 50_000 + "]" * 50_000 + "}", '{"model_type": 1' + "0" * 5000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json: not valid JSON"):
            read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": ["llama"]}')
    with pytest.raises(UserError, match="'model_type' is"):
        read_config(str(tmp_path))


# --- safetensors, bitsandbytes, tokenizers --------------------------------------------------------------------------


def safetensors_bytes():
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    return tensors, safetensors.numpy.save(tensors)


@settings(QUICK, max_examples=200)
@given(EDITS)
def test_a_damaged_safetensors_header(tmp_path, edits):
    _, content = safetensors_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    changed = damaged(content[:start], edits) + content[start:]
    (tmp_path / "m.safetensors").write_bytes(changed)
    with one_line():
        held = read_header(str(tmp_path / "m.safetensors"))
        read = {name: read_tensor(name, tensor) for name, tensor in held.items()}
        with contextlib.suppress(Exception):
            for name, value in safetensors.numpy.load(changed).items():  # where both read it, they agree
                np.testing.assert_array_equal(read[name], value)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "entry",
    [
        5, None, [], {"dtype": "F32"}, entry(dtype=[]), entry(shape=[2.0]), entry(shape=[-2]), entry(shape=[True]),
        entry(shape=[[2]]), entry(shape="2"), entry(offsets=[8, 0]), entry(offsets=[0.5, 8.5]), entry(offsets=[0]),
        entry(offsets=[-8, 0]), entry(offsets=None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["w", "\ud83d", "a\nb"])
def test_an_odd_entry_of_a_safetensors_header(tmp_path, name, entry):
    text = json.dumps({name: entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(UserError, match="its header is not a safetensors header") as error:
        read_header(str(tmp_path / "m.safetensors"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"blocksize": 0}, {"blocksize": "x"}, {"shape": [-2, 64]}, {"shape": 5}, {"nested_offset": []}, {"dtype": 5}],
)
def test_an_odd_state_of_a_quantized_matrix(change):
    state = {"shape": [2, 64], "blocksize": 64, "dtype": "float32", **change}
    arrays = {
        "w": np.zeros((64, 1), np.uint8), "w.absmax": np.ones(2, np.float32), "w.quant_map": np.zeros(16, np.float32),
        "w.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }  # fmt: skip
    shapes = {name: value.shape for name, value in arrays.items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UserError, match="m: "):
        bitsandbytes.as_quantized("m", config, shapes, arrays.__getitem__)
    with pytest.raises(UserError, match="must be an object"):
        as_unquantized("m", {"quantization_config": [1]}, {}, arrays.__getitem__)


@pytest.mark.parametrize("part", [".absmax", ".quant_map", ""])
def test_a_quantized_matrix_with_parts_of_a_wrong_size(part):
    state = {"shape": [2, 64], "blocksize": 64, "dtype": "float32"}
    arrays = {
        "w": np.zeros((64, 1), np.uint8), "w.absmax": np.ones(2, np.float32), "w.quant_map": np.zeros(16, np.float32),
        "w.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }  # fmt: skip
    arrays[f"w{part}"] = np.zeros(7, np.uint8)
    shapes = {name: value.shape for name, value in arrays.items()}
    with pytest.raises(UserError, match="w"):
        bitsandbytes.as_quantized("m", {"load_in_4bit": True}, shapes, arrays.__getitem__)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@settings(QUICK, max_examples=15)
@given(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), EDITS)
def test_damaged_tokenizer_files(tiny, tmp_path, name, edits):
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / file).write_bytes((tiny / file).read_bytes())
    (tmp_path / name).write_bytes(damaged((tiny / name).read_bytes(), edits))
    with one_line():
        assert load_tokenizer(str(tmp_path)).get_vocab()


@pytest.mark.parametrize("change", [{"model_max_length": "256"}, {"model_max_length": [256]}])
def test_a_setting_that_a_tokenizer_looks_at_when_it_is_used(tiny, tmp_path, change):
    for file in ("tokenizer.json", "config.json"):
        (tmp_path / file).write_bytes((tiny / file).read_bytes())
    config = json.loads((tiny / "tokenizer_config.json").read_text()) | change
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{tmp_path}: the tokenizer's files are damaged") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", [5, ["x"], {"a": 1}])
def test_a_chat_template_that_is_no_text(tiny, tmp_path, template):
    for file in ("tokenizer.json", "config.json"):
        (tmp_path / file).write_bytes((tiny / file).read_bytes())
    config = json.loads((tiny / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_directory_that_is_whole_is_still_read(tiny):
    source = open_huggingface(str(tiny))
    assert check_names(source, open_architecture(source)) and source.load_tokenizer()("a")["input_ids"]


# --- GGUF -----------------------------------------------------------------------------------------------------------

TOKENS = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "a", "b", "c", "d", "e"]
METADATA = {
    "llama.context_length": 64, "llama.embedding_length": 32, "llama.block_count": 1, "llama.feed_forward_length": 64,
    "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 16, "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.scores": [0.0] * len(TOKENS),
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 5, "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip
MATRICES = {
    "token_embd": (len(TOKENS), 32), "output_norm": (32,), "output": (len(TOKENS), 32), "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32),
    "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
}  # fmt: skip


def write_gguf(path, **changes):
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in (METADATA | changes).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_float32(key, value) if isinstance(value, float) else writer.add_int64(key, value)
    for name, shape in MATRICES.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.02, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def use_gguf(path):
    source = open_gguf(str(path))
    check_names(source, open_architecture(source))
    assert source.load_tokenizer()("a")["input_ids"]


def test_a_gguf_that_is_whole_is_still_read(tmp_path):
    use_gguf(write_gguf(tmp_path / "m.gguf"))
    use_gguf(write_gguf(tmp_path / "n.gguf", **{"tokenizer.ggml.padding_token_id": -1, "llama.expert_count": 0}))


@pytest.mark.parametrize("value", ["x", [1, 2], ["a"], 1.5, -5, 10**15, float("nan"), True])
@pytest.mark.parametrize("key", sorted(set(METADATA) | {"llama.rope.freq_base", "llama.rope.scaling.type"}))
def test_gguf_metadata_of_a_wrong_type(tmp_path, key, value):
    with one_line():
        use_gguf(write_gguf(tmp_path / "m.gguf", **{key: value}))
        # What is let through: any number for an epsilon or a base, text for a name, and ids of no token.
        assert "freq_base" in key and value in (1.5, 10**15) or key == "tokenizer.ggml.model"


@pytest.mark.parametrize("cut", ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"])
def test_gguf_lists_that_do_not_fit_one_another(tmp_path, cut):
    with pytest.raises(UserError, match=f"'{cut}' has 3 entries for {len(TOKENS)} tokens"):
        use_gguf(write_gguf(tmp_path / "m.gguf", **{cut: METADATA[cut][:3]}))


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def number(key, value, kind=4):
    return text(key) + struct.pack("<I", kind) + struct.pack("<I", value)


RAW = {
    "nested": (0, 1, text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000, "nested more than 4 deep"),
    "dimensions": (1, 0, text("t") + struct.pack("<I", 1000) + b"\1" * 9000, "1000 dimensions, more than 4"),
    "alignment": (0, 1, number("general.alignment", 7), "general.alignment is 7; it must be a power of two"),
    "no alignment": (0, 1, number("general.alignment", 0), "general.alignment is 0"),
    "text alignment": (0, 1, text("general.alignment") + struct.pack("<I", 8) + text("x"), "general.alignment is 'x'"),
    "parts": (0, 1, text("split.count") + struct.pack("<I", 8) + text("x"), "'split.count' is 'x'"),
    "kind": (0, 1, number("general.architecture", 5), "'general.architecture' is 5; it must be text"),
    "twice": (0, 2, number("a", 5) * 2, "has 'a' twice"),
    "counts": (2**60, 2**60, number("a", 5) + text("b"), "cut short or damaged inside its header"),
}


@pytest.mark.parametrize("name", RAW)
def test_a_gguf_header_with_absurd_numbers(tmp_path, name):
    tensors, values, body, says = RAW[name]
    (tmp_path / "m.gguf").write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + body + bytes(64 * (name != "counts"))
    )
    with pytest.raises(UserError) as error:
        open_gguf(str(tmp_path / "m.gguf"))
    assert says in str(error.value) and "\n" not in str(error.value)


@settings(QUICK, max_examples=60)
@given(edits=EDITS)
def test_a_damaged_gguf_header(tmp_path, edits):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    start = whole.index(b"blk.0.ffn_down.weight") + 64
    (tmp_path / "m.gguf").write_bytes(damaged(whole[:start], edits) + whole[start:])
    with one_line():
        use_gguf(tmp_path / "m.gguf")


# --- adapters, runs, scripts ----------------------------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@settings(QUICK, max_examples=200)
@given(
    st.sampled_from(
        ["r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias", "modules_to_save",
         "trainable_token_indices", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
         "use_rslora", "use_dora", "peft_type"]
    ),
    ODD,
)  # fmt: skip
def test_an_adapter_config_with_an_odd_value(tmp_path, key, value):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**ADAPTER, key: value}))
    with one_line():
        spec = read_spec(str(tmp_path))
        assert isinstance(spec.rank, int) and spec.rank >= 1 and np.isfinite(spec.alpha) and 0 <= spec.dropout <= 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 0}, "'r' is 0; it must be a whole number from 1"),
        ({"r": 4.0}, "'r' is 4.0"),
        ({"lora_alpha": float("nan")}, "'lora_alpha' is nan"),
        ({"use_dora": "false"}, "'use_dora' is 'false'; it must be true or false"),
        ({"bias": "some"}, "'bias' is 'some'; it must be one of none, all, lora_only"),
        ({"rank_pattern": {"(": 8}}, "'rank_pattern' has '(', no regular expression"),
        ({"alpha_pattern": {"a": "x"}}, "'alpha_pattern' is"),
        ({"layers_pattern": ["["]}, "'layers_pattern' has '[', no regular expression"),
        ({"trainable_token_indices": {"lm_head": [-1]}}, "'trainable_token_indices' is"),
    ],
)
def test_what_an_adapter_is_refused_for(tmp_path, change, says):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**ADAPTER, **change}))
    with pytest.raises(UserError) as error:
        read_spec(str(tmp_path))
    assert says in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", ["null", "[]", "5", '"x"', "[" * 50_000, "\udcff", '{"r": 1'])
def test_an_adapter_config_that_is_no_object(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="adapter_config.json"):
        read_spec(str(tmp_path))


@pytest.mark.parametrize("content", ['{"a": "x"}', '{"a": -1}', "[]", '{"a": 1e999}', '{"a": null}'])
def test_an_odd_record_of_added_tokens(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(UserError, match=RECORD):
        read_record(str(tmp_path))


GOOD = {"step": 1, "loss": 2.0, "eval_loss": 2.5, "epoch": 0.5, "num_tokens": 64}


@settings(QUICK, max_examples=60)
@given(st.sampled_from([*GOOD, "learning_rate", "grad_norm", "tokens_per_second"]), ODD, ODD, ODD)
def test_odd_rows_and_sections_of_a_run(tmp_path, key, value, config, summary):
    rows = [GOOD, {**GOOD, key: value}, {"loss": value}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"output_dir": "x", "train": config, "model": value}))
    (tmp_path / "summary.json").write_text(json.dumps({"data": summary, "vocab_size": value, "total_steps": summary}))
    with one_line():
        run = read_run(tmp_path)
        assert GOOD in run.metrics
        assert page([run], [run.diagnosis()])
    directory = RunDirectory(tmp_path)
    assert GOOD in directory.metrics() and all(isinstance(row["step"], int) for row in directory.metrics())
    with one_line():
        judged(directory.config(), directory.metrics())
    directory.truncate_metrics(1)
    assert GOOD in directory.metrics()


def test_rows_that_cannot_be_drawn_are_told_of(tmp_path):
    rows = ['{"step": 1, "loss": 2.0}', '{"loss": 1}', '{"step": "x", "loss": 1}', '{"step": 3, "loss": "x"}']
    rows += ['{"step": 4, "loss": 1e999}', '{"step": 1e999, "loss": 1}', '{"step": 5, "loss": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    run = read_run(tmp_path)
    assert [(row["step"], row["loss"]) for row in run.metrics] == [(1, 2.0), (4, None), (5, 3)]
    assert any("line 2 and 3 more of metrics.jsonl cannot be read" in note for note in run.notes)


def test_a_script_whose_variables_grow(tmp_path):
    grow = "\n".join(["A=aaaaaaaaaa"] + ["A=$A$A$A$A$A$A$A$A$A$A"] * 12)
    for body in (grow, grow.replace("A=$A", "export A=x$A"), grow.replace("A=$A", 'A="$A').replace("$A\n", '$A"\n')):
        (tmp_path / "s.sh").write_text(f"{body}\npython train.py --output_dir $A\n")
        with pytest.raises(UserError, match=r"s.sh:\d+: with its variables it grows to more than 1,000,000 characters"):
            read_script(str(tmp_path / "s.sh"), {})
    many = "\n".join(["A=" + "a" * 900_000] + [f"B{i}=$A" for i in range(50)])
    (tmp_path / "s.sh").write_text(f"{many}\npython train.py --output_dir o\n")
    with pytest.raises(UserError, match="the script grows to more than 10,000,000"):
        read_script(str(tmp_path / "s.sh"), {})
    (tmp_path / "s.sh").write_text("# " + "x" * 2_000_000)
    with pytest.raises(UserError, match="more than 1,000,000 characters"):
        read_script(str(tmp_path / "s.sh"), {})


def test_a_script_of_ordinary_length_is_still_read(tmp_path):
    (tmp_path / "s.sh").write_text("A=" + "a" * 1000 + "\nB=$A$A$A\npython train.py --output_dir $B\n")
    words, variables, _ = read_script(str(tmp_path / "s.sh"), {})
    assert words[-1] == "a" * 3000 == variables["B"]


@pytest.mark.parametrize("path", ["x" * 5000, "/tmp/" + "x" * 256, "é" * 200, "~nobody-of-this-name/x.jsonl", "a\0b"])
def test_a_path_that_cannot_be(path, tmp_path):
    with pytest.raises(UserError, match="there is no such file or directory"):
        resolve(path)
    assert cache.load(tmp_path / path.replace("\0", ""), "key") is None


def test_a_cache_whose_name_is_too_long_is_gone_without(tmp_path, caplog):
    cache.save(tmp_path / ("x" * 5000), "key", None)
    assert "could not be cached" in caplog.text
