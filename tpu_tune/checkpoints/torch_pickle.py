"""What a PyTorch checkpoint's pickle says, without running any of it: an unpickler that describes tensors.

A pickle is a program for a stack machine that may import and call whatever it names. This machine imports and calls
nothing: a global becomes its name, if the name is in the table below, and is refused otherwise; "calling" one of them
makes a `TensorDescription` of a tensor whose bytes lie elsewhere in the file. The opcodes themselves are split and
their arguments read by the standard library's `pickletools`, which does not run them either. What is accepted is less
than torch's `weights_only` unpickler takes: no NEWOBJ, no sets, no tensor subclasses, quantized or sparse tensors.
"""

from __future__ import annotations

import dataclasses
import pickletools
from typing import Any, BinaryIO

import numpy as np

from tpu_tune.checkpoints.stored_tensor import DTYPES, row_major, span

# The classes that torch names for a storage -> safetensors' name of its elements. UntypedStorage counts bytes.
_STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.ComplexFloatStorage": "C64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.storage.UntypedStorage": "U8",
}
# Dtypes that came after the storage classes: `_rebuild_tensor_v3` names them.
_DTYPES = {
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}
_PUSH = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_GET = ("BINGET", "LONG_BINGET", "GET")
_PUT = ("BINPUT", "LONG_BINPUT", "PUT")
_MOST_AXES = 64  # NumPy's limit


class UnsupportedPickle(Exception):
    """The pickle asks for something that is no part of a tensor, or is damaged; the text says what."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """What a persistent id says of a storage: its key in the file, its elements' dtype and number.

    `start` and `stop` bound the part that is meant; only files older than torch 0.4 have storages inside others.
    """

    key: str
    dtype: str
    elements: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class TensorDescription:
    """A tensor that the pickle describes; `first` (from its storage's begin) and `strides` count elements."""

    storage: Storage
    dtype: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Elements from the first to the last, both counted."""
        return span(self.shape, self.strides)

    @property
    def is_row_major(self) -> bool:
        """Whether the elements lie without gaps in row-major order (the stride of an axis of one does not matter)."""
        pairs = zip(self.shape, self.strides, row_major(self.shape), strict=True)
        return 0 in self.shape or all(size == 1 or stride == plain for size, stride, plain in pairs)


def read_pickle(stream: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle, up to its STOP: plain values, a `TensorDescription` per tensor, and all storages by key.

    Raises:
      UnsupportedPickle: it names a global that is not in the table, uses an opcode that no tensor needs, or is damaged.
    """
    machine = _PickleMachine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.stack.pop(), machine.storages
            machine.step(opcode.name, argument)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise UnsupportedPickle("its pickle is cut short or damaged; fetch it again") from error
    raise UnsupportedPickle("its pickle has no end; fetch it again")


def printable(text: Any) -> str:
    """Return what an untrusted file says as a piece of one line."""
    shown = "".join(character if character.isprintable() else "?" for character in str(text)[:120])
    return shown or "(nothing)"


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global by its name; it is never looked up."""

    name: str


class StateDict(dict):
    """A collections.OrderedDict. BUILD may give it `_metadata`, the versions of torch's modules, which is dropped."""


class _PickleMachine:
    """The stack, what MARK set aside, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def step(self, op: str, argument: Any) -> None:
        stack = self.stack
        if op in _PUSH:
            stack.append(argument)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _GET:
            stack.append(self.memo[argument])
        elif op in _PUT:
            self.memo[argument] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif op == "EMPTY_LIST":
            stack.append([])
        elif op == "EMPTY_DICT":
            stack.append({})
        elif op in ("TUPLE", "LIST", "DICT"):
            items = self._since_mark()
            made = {"TUPLE": tuple, "LIST": list, "DICT": _pairs}[op](items)
            self.stack.append(made)
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(op[-1]))))
        elif op in ("APPEND", "APPENDS"):
            items = self._pop(1) if op == "APPEND" else self._since_mark()
            _expect(type(self.stack[-1]) is list, f"{op} to something that is no list")
            self.stack[-1].extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if op == "SETITEM" else self._since_mark()
            _expect(isinstance(self.stack[-1], dict), f"{op} into something that is no dict")
            self.stack[-1].update(_pairs(items))
        elif op == "GLOBAL":
            stack.append(_named(argument.replace(" ", ".", 1)))
        elif op == "STACK_GLOBAL":
            module, name = self._pop(2)
            _expect(type(module) is str and type(name) is str, "STACK_GLOBAL on something that is no name")
            stack.append(_named(f"{module}.{name}"))
        elif op == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(_call(function, arguments))
        elif op == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif op == "BUILD":
            (state,) = self._pop(1)
            _check_state(stack[-1], state)
        elif op == "INST":
            name = _named(argument.replace(" ", ".", 1)).name
            raise UnsupportedPickle(f"its pickle makes an object of {name} (INST), which no tensor needs")
        elif op not in ("PROTO", "FRAME"):
            raise UnsupportedPickle(f"its pickle uses {op}, which no tensor needs; nothing of it was run")

    def _pop(self, count: int) -> list[Any]:
        _expect(len(self.stack) >= count, "an opcode without its operands")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _storage(self, pid: Any) -> Storage:
        """Describe the storage of a persistent id: ("storage", class, key, device, elements[, view])."""
        _expect(type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage", "a persistent id of no storage")
        _, kind, key, _, elements, *view = pid
        _expect(isinstance(kind, _Name) and kind.name in _STORAGES, "a storage of no known class")
        _expect(type(key) is str and key.isascii() and key.isdigit() and _is_count(elements), "a storage without a key")
        start, stop = 0, elements
        if view and view[0] is not None:
            _, start, size = view[0]
            _expect(_is_count(start) and _is_count(size) and start + size <= elements, "a view outside its storage")
            stop = start + size
        storage = Storage(key, _STORAGES[kind.name], elements, start, stop)
        first = self.storages.setdefault(key, storage)
        _expect((first.dtype, first.elements) == (storage.dtype, elements), f"storage {key} described in two ways")
        return storage


def _named(name: str) -> _Name:
    if name not in _CALLS and name not in _STORAGES and name not in _DTYPES:
        raise UnsupportedPickle(
            f"its pickle names {printable(name)}, which no tensor needs; nothing of it was run. If you trust the file, "
            "convert it to safetensors where torch is installed (`model.save_pretrained`)"
        )
    return _Name(name)


def _call(function: Any, arguments: Any) -> Any:
    _expect(type(arguments) is tuple, "a call without its arguments")
    if not isinstance(function, _Name) or function.name not in _CALLS:
        shown = function.name if isinstance(function, _Name) else f"a {type(function).__name__}"
        raise UnsupportedPickle(f"its pickle calls {shown}, which is no function; nothing of it was run")
    return _CALLS[function.name](*arguments)


def _check_state(target: Any, state: Any) -> None:
    """BUILD sets attributes: only torch's `_metadata` on a state dict, and that is dropped."""
    if type(target) is not StateDict or type(state) is not dict or set(state) != {"_metadata"}:
        keys = ", ".join(printable(key) for key in list(state)[:5]) if isinstance(state, dict) else type(state).__name__
        raise UnsupportedPickle(f"its pickle sets attributes ({keys}) that no state dict has; nothing of it was run")


def _tensor(
    storage: Any, first: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> TensorDescription:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    _expect(isinstance(storage, Storage), "a tensor without a storage")
    return _described(storage, storage.dtype, first, shape, strides, metadata)


def _tensor_v3(
    storage: Any, first: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorDescription:
    """torch._utils._rebuild_tensor_v3: the storage counts bytes, the tensor has a dtype of its own."""
    _expect(isinstance(storage, Storage) and isinstance(dtype, _Name), "a tensor without a storage or dtype")
    _expect(dtype.name in _DTYPES, f"a tensor of the dtype {dtype.name}")
    return _described(storage, _DTYPES[dtype.name], first, shape, strides, metadata)


def _described(storage: Storage, dtype: str, first: Any, shape: Any, strides: Any, metadata: Any) -> TensorDescription:
    for numbers in (shape, strides):
        _expect(type(numbers) is tuple and len(numbers) <= _MOST_AXES, "a tensor of no shape")
        _expect(all(map(_is_count, numbers)), "a tensor with a negative or unknown size or stride")
    _expect(len(shape) == len(strides) and _is_count(first), "a tensor whose shape, strides and offset do not agree")
    if metadata:
        raise UnsupportedPickle("a tensor is stored conjugated or negated, which is not read here; save it resolved")
    width, stored = (np.dtype(DTYPES[name]).itemsize for name in (dtype, storage.dtype))
    begin, end = storage.start * stored, storage.stop * stored
    tensor = TensorDescription(storage, dtype, begin // width + first, shape, strides)
    if begin % width or tensor.elements and (tensor.first + tensor.elements) * width > end:
        raise UnsupportedPickle(
            f"a tensor of shape {shape}, strides {strides} and offset {first} does not fit its storage of "
            f"{(end - begin) // width} elements; fetch the file again"
        )
    return tensor


def _parameter(tensor: Any, grad: Any = None, hooks: Any = None, state: Any = None) -> TensorDescription:
    """torch._utils._rebuild_parameter and _with_state; a Parameter's Python attributes (`state`) say nothing of it."""
    _expect(isinstance(tensor, TensorDescription), "a parameter without a tensor")
    return tensor


def _ordered_dict() -> StateDict:
    return StateDict()  # with arguments it would copy, as often as the file likes


def _size(numbers: Any = ()) -> tuple[int, ...]:
    _expect(type(numbers) is tuple, "a torch.Size of something that is no tuple")
    return numbers


_CALLS = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """Make keys and values that alternate a dict. Only text and numbers are keys: hashing may not recurse."""
    keys, values = items[::2], items[1::2]
    _expect(len(keys) == len(values) and all(type(key) in (str, int) for key in keys), "a dict with odd keys")
    return dict(zip(keys, values, strict=True))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnsupportedPickle(f"its pickle has {otherwise}; fetch the file again, or convert it to safetensors")
