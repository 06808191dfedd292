"""pytorch_model.bin without torch: against torch's own files, and what hostile and broken ones are told."""

import json
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import huggingface_hub
import numpy as np
import pytest
import tiny_models
from helpers_torch_files import (
    call,
    golden_arrays,
    golden_state,
    group,
    integer,
    named,
    state_dict,
    storage,
    tensor,
    text,
    write_arrays,
    write_legacy,
    write_zip,
)

from tpu_tune.checkpoints.params import load_params
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.stored_tensor import read_tensor
from tpu_tune.checkpoints.torch_file import read_torch_header
from tpu_tune.errors import UserError
from tpu_tune.models import architecture

SIX = np.arange(6, dtype=np.float32)
GOOD = tensor(storage(), (2, 3), (3, 1))
PICKLE = state_dict({"w": GOOD})


def read(path):
    return {name: read_tensor(name, stored) for name, stored in read_torch_header(str(path)).items()}


def refusal(path):
    """Return what a file is told: one line that begins with its name."""
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 400
    return message.removeprefix(f"{path}: ")


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize("format_", ["zip", "legacy"])
def test_goldens_that_torch_wrote(format_):
    """Tied and transposed tensors, slices, repeats, a Parameter, bfloat16 and float8, in torch 2.13's bytes."""
    path = str(tiny_models.GOLDENS / f"pytorch_model_{format_}.bin")
    assert_same(read(path), golden_arrays())
    stored = read_torch_header(path)
    assert stored["embed.weight"] == stored["head.weight"]  # tied: the bytes are there once


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_every_dtype_and_view_equals_torch(tmp_path, new):
    torch = pytest.importorskip("torch")
    dtypes = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64 float8_e4m3fn "
        "float8_e5m2 complex64"
    )
    generator = torch.Generator().manual_seed(0)
    state = golden_state()
    for dtype in dtypes.split():
        state[dtype] = (torch.rand(3, 4, 5, generator=generator) * 100).to(getattr(torch, dtype))
        state[f"{dtype}.view"] = state[dtype].permute(2, 0, 1)[1::2, :, 1:]
    with_state = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    with_state.tag = "kept by torch, dropped here"
    state |= {"with_state": with_state, "one": torch.ones(4, 1)[:, :1].T, "steps": 7, "note": "text", "none": None}
    for wrapped in (state, {"state_dict": state, "optimizer": [1]}):
        torch.save(wrapped, tmp_path / "m.bin", _use_new_zipfile_serialization=new)
        found = read(tmp_path / "m.bin")
        assert found.keys() == {name for name, value in state.items() if isinstance(value, torch.Tensor)}
        for name, array in found.items():
            wanted = state[name].detach().contiguous()
            assert array.shape == wanted.shape and str(array.dtype) == str(wanted.dtype).removeprefix("torch."), name
            assert array.tobytes() == wanted.reshape(-1).view(torch.uint8).numpy().tobytes(), name
    for entry, reason in [
        ({"w": torch.rand(2, dtype=torch.complex64).conj()}, "stored conjugated or negated"),
        ({"w": torch.ones(2, 2).to_sparse()}, r"names torch\._utils\._rebuild_sparse_tensor"),
        ({"w": torch.ones(2), "model": {"a": torch.ones(2)}}, "model holds a dict where a tensor"),
        (torch.ones(2), "holds a tensor where a dict"),
        (torch.nn.Linear(2, 2), r"names torch\.nn\.modules\.linear\.Linear"),
    ]:
        torch.save(entry, tmp_path / "m.bin", _use_new_zipfile_serialization=new)
        pytest.raises(UserError, read, tmp_path / "m.bin").match(reason)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_files_put_together_by_hand(tmp_path, write):
    entries = {
        "w": GOOD,
        "turned": tensor(storage(), (3, 2), (1, 3)),
        "column": tensor(storage(), (2,), (3,), first=2),
        "inside": tensor(storage(rest=group(text("9"), integer(2), integer(3))), (3,), (1,)),
    }
    found = read(write(tmp_path / "m.bin", state_dict(entries), {"0": SIX.tobytes()}))
    table = SIX.reshape(2, 3)
    assert_same(found, {"w": table, "turned": table.T, "column": table[:, 2], "inside": SIX[2:5]})


def _numpy_model(tmp_path, tensors):
    write_arrays(tmp_path / "pytorch_model.bin", tensors)


def _sharded(tmp_path, tensors):
    weight_map = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        write_arrays(tmp_path / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _torch_model(tmp_path, tensors, new=True):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.asfortranarray(array)) for name, array in tensors.items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)


def _torch_legacy_model(tmp_path, tensors):
    _torch_model(tmp_path, tensors, new=False)


@pytest.mark.parametrize("write", [_numpy_model, _sharded, _torch_model, _torch_legacy_model])
def test_a_model_loads_as_from_its_safetensors_twin(tmp_path, write):
    config = tiny_models.CONFIGS["llama2"]
    twin = open_source(str(tiny_models.write(tmp_path / "twin", config)))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text(json.dumps(config))
    write(tmp_path / "bin", {name: twin.read(name) for name in twin.shapes})
    source = open_source(str(tmp_path / "bin"))
    assert source.shapes == twin.shapes and source.fingerprint != twin.fingerprint
    assert_same({name: source.read(name) for name in source.shapes}, {name: twin.read(name) for name in twin.shapes})
    wanted = load_params(twin, architecture(config))
    assert_same(load_params(source, architecture(config)), {name: np.asarray(leaf) for name, leaf in wanted.items()})


def test_safetensors_go_first_and_a_missing_shard_is_named(tmp_path):
    config = tiny_models.CONFIGS["llama2"]
    directory = tmp_path / "m"
    tiny_models.write(directory, config)
    (directory / "pytorch_model.bin").write_bytes(b"not looked at")
    tensors = {name: open_source(str(directory)).read(name) for name in open_source(str(directory)).shapes}
    for name in ("model.safetensors", "pytorch_model.bin"):
        (directory / name).unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors or .* nor pytorch_model\.bin or "):
        open_source(str(directory))
    _sharded(directory, tensors)
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002\.bin: this shard is missing"):
        open_source(str(directory))


@pytest.mark.parametrize("held", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_the_hub_is_asked_for_pickles_only_without_safetensors(tmp_path, monkeypatch, held):
    (tmp_path / held).write_bytes(b"")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.extend(allow_patterns) or tmp_path
    )
    pytest.raises(UserError, open_source, "somebody/model").match("config.json")
    assert ("pytorch_model.bin" in asked) == ("pytorch_model-*.bin" in asked) == (held == "pytorch_model.bin")


def test_a_tensor_is_read_alone(tmp_path):
    """Out of a file of 1 GB: opening, then a column of a matrix and a view in the middle, in less than 1 MB."""
    rows, columns = 2**16, 2**12
    size = rows * columns
    whole = storage("1", size)
    entries = {
        "large": tensor(whole, (rows, columns), (columns, 1)),
        "part": tensor(whole, (8, 8), (columns, 2), first=size // 2),
        "w": GOOD,
    }
    path = tmp_path / "m.bin"
    write_legacy(path, state_dict(entries), {"0": SIX.tobytes(), "1": b""})
    with open(path, "r+b") as file:  # the second storage is a hole in the file, but for one number
        file.seek(-8, os.SEEK_END)
        file.write(struct.pack("<q", size))
        start = file.tell()
        file.truncate(start + 4 * size)
        file.seek(start + 4 * (size // 2 + columns + 2))
        file.write(struct.pack("<f", 7.0))
    tracemalloc.start()
    stored = read_torch_header(str(path))
    part = read_tensor("part", stored["part"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part[1, 1] == 7 and np.count_nonzero(part) == 1 and peak < 1e6, peak
    assert stored["large"].nbytes == 4 * size


def _attack(how, target):
    """Return a pickled value that makes the file `target` when Python reads it, and the name that is to be refused."""
    command, code = text(f"touch {target}"), text(f"open({str(target)!r}, 'w').close()")
    system, run = named("os.system"), group(command) + b"R"
    module = call("importlib.import_module", text("os"))
    state = group(system, group(command), b"}", b"N")
    return {
        "reduce": (system + run, "os.system"),
        "posix": (named("posix.system") + run, "posix.system"),
        "eval": (call("builtins.exec", code), "builtins.exec"),
        "python 2 name": (call("__builtin__.eval", code), "__builtin__.eval"),
        "inst": (b"(" + command + b"ios\nsystem\n", "os.system"),
        "obj": (b"(" + system + command + b"o", "os.system"),
        "stack global": (text("os") + text("system") + b"\x93" + run, "os.system"),
        "memo": (b"](" + text("os") + b"q\x63" + text("system") + b"q\x64eh\x63h\x64\x93" + run + b"a", "os.system"),
        "getattr": (call("builtins.getattr", module, text("system")) + run, "builtins.getattr"),
        "dotted": (b"\x80\x04" + text("pathlib") + text("os.system") + b"\x93" + run, "pathlib.os.system"),
        "build": (call("functools.partial", named("builtins.print")) + state + b"b)R", "functools.partial"),
    }[how]


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(
    "how",
    ["reduce", "posix", "eval", "python 2 name", "inst", "obj", "stack global", "memo", "getattr", "dotted", "build"],
)
def test_a_hostile_pickle_is_refused_by_name_and_nothing_runs(tmp_path, how, write):
    target = tmp_path / "ran"
    payload, name = _attack(how, target)
    content = b"\x80\x02}(" + text("a") + payload + b"u."
    pickle.loads(content)  # Python's own unpickler does run it
    assert target.exists()
    target.unlink()
    message = refusal(write(tmp_path / "m.bin", content, {}))
    assert f"names {name}, which no tensor needs; nothing of it was run" in message and "safetensors" in message
    behind = state_dict({"w": GOOD, "a": payload})  # and after a good tensor
    assert f"names {name}," in refusal(write(tmp_path / "m.bin", behind, {"0": SIX.tobytes()}))
    assert not target.exists()


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (named("torch.load"), "names torch.load, "),
        (named("torch._utils._rebuild_qtensor"), "names torch._utils._rebuild_qtensor, "),
        (named("torch.storage._load_from_bytes"), "names torch.storage._load_from_bytes, "),
        (named("torch.QInt8Storage"), "names torch.QInt8Storage, "),
        (text("collections") + text("OrderedDict.update") + b"\x93", "names collections.OrderedDict.update, "),
        (text("os\nx") + text("a\x1bb") + b"\x93", "names os?x.a?b, "),
        (integer(1) + text("system") + b"\x93", "STACK_GLOBAL on something that is no name"),
        (named("collections.OrderedDict") + b")\x81", "uses NEWOBJ"),
        (b"\x82\x01", "uses EXT1"),
        (b"Pos\n", "uses PERSID"),
        (b"(icollections\nOrderedDict\n", "makes an object of collections.OrderedDict (INST)"),
        (b"(" + named("torch.Size") + b"o", "uses OBJ"),
        (call("torch.FloatStorage", integer(4)), "calls torch.FloatStorage, which is no function"),
        (text("os.system") + b")R", "calls a str, which is no function"),
        (named("torch.Size") + b"]R", "a call without its arguments"),
        (call("collections.OrderedDict", b"]"), "cut short or damaged"),
        (call("torch.Size", b"]"), "a torch.Size of something that is no tuple"),
        (call("torch._utils._rebuild_parameter", b"N"), "a parameter without a tensor"),
        (call("collections.OrderedDict") + b"}" + text("__class__") + named("torch.Size") + b"sb", "(__class__)"),
        (call("collections.OrderedDict") + group(b"}", b"}") + b"b", "sets attributes (tuple)"),
        (GOOD + b"}" + text("__reduce__") + b"Nsb", "sets attributes (__reduce__)"),
        (b"}}" + text("_metadata") + b"Nsb", "sets attributes (_metadata)"),
        (b"h\x63", "cut short or damaged"),  # a memo that was never put
        (b"(s", "an opcode without its operands"),
        (b"0", "uses POP"),
        (b"(t" + text("x") + b"a", "APPEND to something that is no list"),
        (b"]" + text("x") + b"Ns", "SETITEM into something that is no dict"),
        (b"})Ns", "a dict with odd keys"),
        (b"}" + b")" + b"\x85" * 200_000 + b"Ns", "a dict with odd keys"),  # hashing it would overflow the stack
        (group(text("module"), b"N", b"N", b"N") + b"Q", "a persistent id of no storage"),
        (integer(3) + b"Q", "a persistent id of no storage"),
        (storage("../data.pkl"), "a storage without a key"),
        (storage("0", -6), "a storage without a key"),
        (storage(kind="torch.Size"), "a storage of no known class"),
        (storage("0", 6, "torch.DoubleStorage"), "storage 0 described in two ways"),
        (storage(rest=group(text("1"), integer(4), integer(3))), "a view outside its storage"),
        (tensor(b"N", (2,), (1,)), "a tensor without a storage"),
        (tensor(storage(), (7,), (1,)), "does not fit its storage of 6 elements"),
        (tensor(storage(), (2, 3), (3, 1), first=1), "does not fit its storage"),
        (tensor(storage(), (2**40, 2**40), (2**40, 1)), "does not fit its storage"),
        (tensor(storage(), (2, 3), (3, -1), first=2), "negative or unknown size or stride"),
        (tensor(storage(), (-2, 3), (3, 1)), "negative or unknown size or stride"),
        (tensor(storage(), (2, 3), (3, 1), first=-1), "shape, strides and offset do not agree"),
        (tensor(storage(), (2, 3), (1,)), "shape, strides and offset do not agree"),
        (tensor(storage(), (1,) * 65, (1,) * 65), "a tensor of no shape"),
        (tensor(storage(rest=b"N"), (2,), (1,), rest=b"}" + text("neg") + b"\x88s"), "conjugated or negated"),
        (b"]", "x holds a list where a tensor"),
        (named("torch.FloatStorage"), "x holds a Name where a tensor"),
    ],
)
def test_tricks_are_refused(tmp_path, payload, reason):
    path = write_zip(tmp_path / "m.bin", state_dict({"w": GOOD, "x": payload}), {"0": SIX.tobytes()})
    assert reason in refusal(path)


def test_a_number_that_says_nothing_more_is_passed_over(tmp_path):
    content = state_dict({"w": GOOD, "epoch": integer(3), "note": text("best"), "none": b"N"})
    assert list(read(write_zip(tmp_path / "m.bin", content, {"0": SIX.tobytes()}))) == ["w"]
    assert refusal(write_zip(tmp_path / "m.bin", state_dict({"epoch": integer(3)}), {})) == "holds no tensors"
    unprintable = state_dict({"a\nb": GOOD})
    assert "a?b holds a tensor" in refusal(write_zip(tmp_path / "m.bin", unprintable, {"0": SIX.tobytes()}))


def test_every_cut_is_noticed(tmp_path):
    """Cut after each byte: a zip loses its directory, the old format its storages; no cut reads as a whole file."""
    for write in (write_zip, write_legacy):
        data = write(tmp_path / "whole.bin", PICKLE, {"0": SIX.tobytes()}).read_bytes()
        for length in range(0, len(data), 1 if write is write_legacy else 7):
            (tmp_path / "cut.bin").write_bytes(data[:length])
            message = refusal(tmp_path / "cut.bin")
            assert "cut short" in message or "no end" in message, (length, message)


@pytest.mark.parametrize("format_", ["zip", "legacy"])
def test_an_altered_byte_gives_one_line_or_other_numbers(tmp_path, format_):
    data = (tiny_models.GOLDENS / f"pytorch_model_{format_}.bin").read_bytes()
    altered = 0
    for at in range(0, len(data), 7):
        (tmp_path / "m.bin").write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            read(tmp_path / "m.bin")
        except UserError as error:
            assert str(error).isprintable()
            altered += 1
    assert altered > 50


def _damaged_offset(path):
    data = bytearray(write_zip(path, PICKLE, {"0": SIX.tobytes()}).read_bytes())
    at = data.index(b"PK\x01\x02", data.rindex(b"archive/data/0") - 60)
    data[at + 42 : at + 46] = struct.pack("<I", 3)
    path.write_bytes(data)


def _compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), PICKLE)
        archive.writestr("archive/data/0", bytes(24))


def _twice(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own warning
        write_zip(path, PICKLE, {"0": SIX.tobytes()}, **{"archive/data.pkl": PICKLE})


def _wrong_sum(path):
    data = write_zip(path, PICKLE, {"0": SIX.tobytes()}).read_bytes()
    path.write_bytes(data.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3", 1))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p.write_bytes(b""), "not a file that torch.save wrote"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "not a file that torch.save wrote"),
        (lambda p: p.write_bytes(pickle.dumps({"w": 1}, 2)), "a pickle, but not one that torch.save wrote"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)), "a damaged zip file"),
        (_damaged_offset, "archive/data/0 is not where the directory says"),
        (_wrong_sum, "Bad CRC-32"),
        (_compressed, "archive/data/0 is compressed"),
        (_twice, "two members of one name"),
        (lambda p: write_zip(p, PICKLE, {}, **{"other/data.pkl": PICKLE}), "with 2 data.pkl"),
        (lambda p: zipfile.ZipFile(p, "w").writestr("a/b/data.pkl", PICKLE), "with 0 data.pkl"),
        (lambda p: write_zip(p, PICKLE, {"0": SIX.tobytes()}, byteorder=b"big"), "big-endian"),
        (lambda p: write_zip(p, PICKLE, {}), "the bytes of w (storage 0) are missing"),
        (lambda p: write_zip(p, PICKLE, {"../0": bytes(24)}, **{"/etc/passwd": b""}), "(storage 0) are missing"),
        (lambda p: write_zip(p, PICKLE, {"0": bytes(20)}), "are 20, not 24"),
        (lambda p: write_zip(p, PICKLE[:-1], {"0": bytes(24)}), "cut short or damaged"),
        (lambda p: write_legacy(p, PICKLE, {"0": SIX.tobytes()}, little_endian=False), "big-endian"),
        (lambda p: write_legacy(p, PICKLE, {"0": SIX.tobytes()}, version=1002), "format version 1002"),
        (lambda p: write_legacy(p, PICKLE, {"1": SIX.tobytes()}), "list of storages does not fit"),
        (lambda p: write_legacy(p, PICKLE, {}), "the bytes of w (storage 0) are missing"),
        (lambda p: write_legacy(p, PICKLE, {"0": SIX.tobytes()}, width=2), "12 elements, not the 6 promised"),
        (lambda p: write_legacy(p, PICKLE, {"0": bytes(20)}), "cut short"),
    ],
)
def test_a_broken_file_is_named(tmp_path, damage, reason):
    damage(tmp_path / "m.bin")
    assert reason in refusal(tmp_path / "m.bin")
