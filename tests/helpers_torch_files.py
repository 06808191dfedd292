"""torch's files without torch: pickles put together from opcodes, in both containers; and what the goldens hold.

`make_goldens.py` lets torch write `golden_state` to tests/goldens/pytorch_model_{zip,legacy}.bin.
"""

from __future__ import annotations

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np

_CLASSES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}
_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + group(*arguments) + b"R"


def storage(key="0", elements=6, kind="torch.FloatStorage", rest=b"") -> bytes:
    return group(text("storage"), named(kind), text(key), text("cpu"), integer(elements), rest) + b"Q"


def tensor(storage_: bytes, shape, strides, first=0, rest=b"") -> bytes:
    shape, strides = (group(*map(integer, numbers)) for numbers in (shape, strides))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage_, integer(first), shape, strides, b"\x89", hooks, rest)


def state_dict(entries: dict[str, bytes]) -> bytes:
    items = b"".join(text(name) + value for name, value in entries.items())
    metadata = b"}" + text("_metadata") + call("collections.OrderedDict") + b"sb"
    return b"\x80\x02" + call("collections.OrderedDict") + b"(" + items + b"u" + metadata + b"."


def write_zip(path, content: bytes, storages: dict[str, bytes], byteorder=b"little", **more: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in more.items():
            archive.writestr(name, data)
    return path


def write_legacy(path, content: bytes, storages: dict[str, bytes], width=4, little_endian=True, version=1001):
    machine = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"long": 4}}
    parts = [_MAGIC, pickle.dumps(version, 2), pickle.dumps(machine, 2), content, pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", len(data) // width) + data for data in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


def write_arrays(path, arrays: dict[str, np.ndarray]):
    """Write row-major arrays as torch.save does."""
    entries, storages = {}, {}
    for key, (name, array) in enumerate(arrays.items()):
        kind = f"torch.{_CLASSES[array.dtype.name]}"
        strides = [stride // array.itemsize for stride in array.strides]
        entries[name] = tensor(storage(str(key), array.size, kind), array.shape, strides)
        storages[str(key)] = array.tobytes()
    return write_zip(path, state_dict(entries), storages)


def golden_arrays() -> dict[str, np.ndarray]:
    """What the goldens hold, as a formula."""
    table = (np.arange(12, dtype=np.float32) - 5.5).reshape(4, 3)
    return {
        "embed.weight": table.astype(ml_dtypes.bfloat16),
        "head.weight": table.astype(ml_dtypes.bfloat16),
        "turned": np.arange(6, dtype=np.float16).reshape(2, 3).T,
        "part": np.arange(20).reshape(4, 5)[1:3, 1:4],
        "parameter": np.linspace(-1, 1, 5, dtype=np.float32),
        "repeated": np.broadcast_to(np.array([[3], [4]], np.int8), (2, 3)),
        "eight": table.astype(ml_dtypes.float8_e4m3fn),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False, True]),
    }


def golden_state():
    """Return the same as torch makes it: tied storages, views, a Parameter."""
    import torch

    table = (torch.arange(12, dtype=torch.float32) - 5.5).reshape(4, 3)
    embedding = table.to(torch.bfloat16)
    return {
        "embed.weight": embedding,
        "head.weight": embedding,
        "turned": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,
        "part": torch.arange(20).reshape(4, 5)[1:3, 1:4],
        "parameter": torch.nn.Parameter(torch.linspace(-1, 1, 5)),
        "repeated": torch.tensor([[3], [4]], dtype=torch.int8).expand(2, 3),
        "eight": table.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
    }
