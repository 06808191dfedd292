"""Reading `pytorch_model.bin` without torch: where each tensor's bytes lie, in both of torch's formats.

Opening reads pickles only, and runs nothing of them (see `torch_pickle`). The bytes of the tensors stay in the file
until one is asked for; a view that is not row-major is read from its first element to its last, then put in order, so
that host memory peaks at about one tensor (twice for such a view). Tied weights share their bytes in the file.

Formats (torch/serialization.py):
- since torch 1.6 a zip whose members are stored uncompressed, so that their offsets are offsets in the file:
  `<root>/data.pkl`, `<root>/data/<key>` with one storage each, `<root>/byteorder` since torch 2.0;
- before, pickles one after the other: a magic number, the protocol's version, a dict of the machine's properties, the
  content, the list of storage keys; then for each key the number of elements (eight bytes, little endian) and these.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from tpu_tune.checkpoints.stored_tensor import DTYPES, StoredTensor
from tpu_tune.checkpoints.torch_pickle import Storage, TensorDescription, UnsupportedPickle, printable, read_pickle
from tpu_tune.errors import UserError

_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field
_PICKLE_START = b"\x80"
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_ENCRYPTED = 1  # a bit of a zip member's flags

# Where each storage's bytes lie: key -> absolute offset, length.
_Locations = dict[str, tuple[int, int]]


def read_torch_header(path: str) -> dict[str, StoredTensor]:
    """Find the tensors of one file that `torch.save` wrote of a state dict, by name.

    A state dict under the key `state_dict`, as training programs save it, is taken out. Entries that are numbers, text
    or None are left out.

    Raises:
      UserError: the file is missing, cut short, damaged, big-endian or compressed, its pickle names anything that is
        not part of a tensor (the name is given), or it holds something other than tensors.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        start = file.read(4)
    try:
        if start == _ZIP_START:
            content, locations = _read_zip(path)
        elif start.startswith(_PICKLE_START):
            content, locations = _read_legacy(path)
        else:
            raise UnsupportedPickle("cut short or not a file that torch.save wrote; fetch it again")
        return {name: _stored(path, name, tensor, locations) for name, tensor in _named(content).items()}
    except UnsupportedPickle as error:
        raise UserError(f"{path}: {error}") from error


def _read_zip(path: str) -> tuple[Any, _Locations]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise UnsupportedPickle("has two members of one name, which torch does not write; do not trust it")
            pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise UnsupportedPickle(
                    f"a zip file with {len(pickles)} data.pkl where torch.save writes one; fetch it again"
                )
            root = pickles[0].removesuffix("data.pkl")
            order = members.get(f"{root}byteorder")
            if order is not None and archive.read(_plain(order)) != b"little":
                raise UnsupportedPickle(
                    "its numbers are big-endian, which is not read here; save it again on another machine"
                )
            with io.BufferedReader(archive.open(_plain(members[pickles[0]]))) as stream:
                content, storages = read_pickle(stream)
        locations = {}
        with open(path, "rb") as file:
            for key in storages:
                if (member := members.get(f"{root}data/{key}")) is not None:
                    locations[key] = _location(file, _plain(member))
        return content, locations
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise UnsupportedPickle(f"cut short or a damaged zip file ({printable(error)}); fetch it again") from error


def _plain(member: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """Return the member if its bytes stand in the file as they are."""
    plain = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
    if not plain or member.flag_bits & _ENCRYPTED:
        raise UnsupportedPickle(
            f"its member {printable(member.filename)} is compressed or encrypted, which torch.save does not do; "
            "fetch the file again, or unpack it and save it with torch"
        )
    return member


def _location(file: io.BufferedReader, member: zipfile.ZipInfo) -> tuple[int, int]:
    file.seek(member.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    offset = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if signature != _ZIP_START or offset + member.file_size > os.fstat(file.fileno()).st_size:
        raise zipfile.BadZipFile(f"{member.filename} is not where the directory says")
    return offset, member.file_size


def _read_legacy(path: str) -> tuple[Any, _Locations]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if read_pickle(file)[0] != _MAGIC_NUMBER:
            raise UnsupportedPickle("a pickle, but not one that torch.save wrote; fetch it again")
        version = read_pickle(file)[0]
        if version != _PROTOCOL_VERSION:
            raise UnsupportedPickle(f"of torch's format version {printable(version)}; known: {_PROTOCOL_VERSION}")
        machine = read_pickle(file)[0]
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise UnsupportedPickle(
                "its numbers are big-endian, which is not read here; save it again on another machine"
            )
        content, storages = read_pickle(file)
        keys = read_pickle(file)[0]
        if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
            raise UnsupportedPickle("its list of storages does not fit its content; fetch it again")
        locations = {}
        at = file.tell()
        for key in keys:
            file.seek(at)
            elements = int.from_bytes(file.read(8), "little")
            length = storages[key].elements * _width(storages[key].dtype)
            at += 8 + length
            if at > size:
                raise UnsupportedPickle(
                    f"cut short: its content promises {at} bytes or more, it has {size}; fetch it again"
                )
            if elements != storages[key].elements:
                raise UnsupportedPickle(
                    f"storage {key} has {elements} elements, not the {storages[key].elements} promised"
                )
            locations[key] = at - length, length
    return content, locations


def _named(content: Any) -> dict[str, TensorDescription]:
    """Pick the tensors of a state dict; what is neither a tensor nor a plain value is refused by its key."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UnsupportedPickle(f"holds a {_kind(content)} where a dict from name to tensor is expected")
    tensors = {}
    for name, entry in content.items():
        if isinstance(entry, TensorDescription) and isinstance(name, str) and name.isprintable():
            tensors[name] = entry
        elif entry is not None and not isinstance(entry, bool | int | float | str):
            raise UnsupportedPickle(
                f"{printable(name)} holds a {_kind(entry)} where a tensor under a plain name is expected; "
                "save the model's state dict alone"
            )
    if not tensors:
        raise UnsupportedPickle("holds no tensors")
    return tensors


def _kind(entry: Any) -> str:
    if isinstance(entry, TensorDescription):
        return "tensor"
    return "dict" if isinstance(entry, dict) else type(entry).__name__.strip("_")


def _stored(path: str, name: str, tensor: TensorDescription, locations: _Locations) -> StoredTensor:
    storage: Storage = tensor.storage
    if storage.key not in locations:
        raise UnsupportedPickle(f"the bytes of {name} (storage {storage.key}) are missing; fetch the file again")
    offset, length = locations[storage.key]
    promised = storage.elements * _width(storage.dtype)
    if promised > length:
        raise UnsupportedPickle(
            f"the bytes of {name} (storage {storage.key}) are {length}, not {promised}; fetch the file again"
        )
    width = _width(tensor.dtype)
    return StoredTensor(
        file=path,
        offset=offset + tensor.first * width,
        nbytes=tensor.elements * width,
        dtype=tensor.dtype,
        shape=tensor.shape,
        strides=None if tensor.is_row_major else tensor.strides,
    )


def _width(dtype: str) -> int:
    return np.dtype(DTYPES[dtype]).itemsize
