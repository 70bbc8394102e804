"""Files written by torch.save, read as data: no torch, no `pickle` module, no code of the file is run.

A pickle is a program for a stack machine, and the danger of loading one lies in two of its instructions: one imports
any object by name, the other calls it. The machine here has neither. A name stays a name, and "calling" it looks it up
in `CONSTRUCTORS`, which holds what a state dict consists of; every other name, and every instruction that a state dict
does not need, is refused by name. Tensors come out as bounds-checked views of the mapped file.

Both layouts are read: the zip archive of torch 1.6 and later (`*/data.pkl`, one stored member `*/data/KEY` per storage),
and the legacy one (five pickles: magic number, protocol, system, object, storage keys; then per key an int64 count and
the raw elements). Source: torch/serialization.py and torch/_utils.py of torch 2.13.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from npllm.arrays import Array
from npllm.errors import CheckpointError

# NumPy's view of each safetensors format; the narrow floats that NumPy lacks are handled as their bits.
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip

# torch's storage classes; an untyped storage gets its type from the tensor.
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}  # fmt: skip

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

# A state dict of 100,000 tensors is a pickle of some 20 MB.
LONGEST_PICKLE = 64 << 20
LARGEST_SIZE = 1 << 48

# Where training scripts put the state dict, when the file holds more.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


class Name(NamedTuple):
    """An object that the pickle names; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:200]


class Storage(NamedTuple):
    """Consecutive elements of one type: `length` of them from `first` on, in the storage `key` of `numel` elements."""

    key: str
    dtype: str
    numel: int
    first: int
    length: int


class Tensor(NamedTuple):
    """A view of a storage: offset and strides in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class State(dict[Any, Any]):
    """Stands for OrderedDict, whose attributes (`_metadata`) are not kept."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a mapped file. `dtype` is the safetensors name, `start` the byte of its first element, `stride`
    counts elements."""

    path: Path
    mapping: mmap.mmap
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def array(self) -> Array:
        """The elements, as a view of the file wherever they are contiguous there, in NumPy's type for `dtype`."""
        dtype = np.dtype(NUMPY[self.dtype])
        if self.elements == 0:
            return np.zeros(0, dtype)
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        flat = np.frombuffer(self.mapping, dtype, extent, self.start)
        strides = [step * dtype.itemsize for step in self.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False))


class TorchFile(NamedTuple):
    """The tensors of one file by name, and the names of the entries that are not tensors."""

    tensors: dict[str, StoredTensor]
    left_out: list[str]


def read_torch_file(path: Path) -> TorchFile:
    """Read a file of torch.save; whatever is not a plain state dict of dense tensors is a CheckpointError."""
    mapping = _map(path)
    try:
        reader = _read_zip if mapping[:4] == b"PK\x03\x04" else _read_legacy
        value, regions = reader(path, mapping)
        tensors, left_out = _state_dict(value)
        return TorchFile({name: _place(path, mapping, name, tensors[name], regions) for name in tensors}, left_out)
    except UnreadableError as bad:
        raise CheckpointError(f"{path}: {one_line(str(bad))}") from None


def one_line(text: str) -> str:
    """`text`, parts of which a file chose, without line breaks and other control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


class UnreadableError(ValueError):
    """What is wrong with a file, without its name."""


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as bad:
        raise CheckpointError(f"{path}: cannot be read ({bad})") from None


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def _expect(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise UnreadableError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _expect_size(value: Any, what: str) -> int:
    if not 0 <= _expect(value, int, what) < LARGEST_SIZE:
        raise UnreadableError(f"{what} is negative or absurdly large")
    return int(value)


def _expect_sizes(value: Any, what: str) -> tuple[int, ...]:
    if len(_expect(value, tuple, what)) > 32:
        raise UnreadableError(f"{what} has {len(value)} axes")
    return tuple(_expect_size(size, what) for size in value)


def _storage(identity: Any) -> Storage:
    """The persistent id ("storage", class, key, device, elements), in legacy files also (view key, first, count)."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise UnreadableError("holds a reference that is not a storage")
    kind, key, numel = _expect(identity[1], Name, "storage class"), identity[2], _expect_size(identity[4], "storage size")
    if kind.module not in ("torch", "torch.storage") or kind.name not in STORAGES:
        raise UnreadableError(f"storage class {kind} is not supported")
    first, length = 0, numel
    if len(identity) == 6 and identity[5] is not None:
        _, first, length = _expect_sizes((0, *_expect(identity[5], tuple, "storage view")[1:]), "storage view")
        if first + length > numel:
            raise UnreadableError(f"a view of storage {str(key)[:40]} reaches beyond its {numel} elements")
    return Storage(_expect(key, str, "storage key"), STORAGES[kind.name], numel, first, length)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any, dtype: str | None = None) -> Tensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2; gradients and hooks are of no use here."""
    _expect(storage, Storage, "a tensor's storage")
    sizes, strides = _expect_sizes(shape, "a tensor's shape"), _expect_sizes(stride, "a tensor's stride")
    if len(sizes) != len(strides):
        raise UnreadableError(f"a tensor of {len(sizes)} axes has {len(strides)} strides")
    return Tensor(storage, dtype or storage.dtype, _expect_size(offset, "a tensor's offset"), sizes, strides)


def _typed_tensor(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v3: the tensor's type stands beside an untyped storage."""
    name = _expect(dtype, Name, "a tensor's dtype")
    if name.module != "torch" or name.name not in DTYPES:
        raise UnreadableError(f"dtype {name} is not supported")
    return _tensor(storage, offset, shape, stride, dtype=DTYPES[name.name])


def _parameter(tensor: Any, *_: Any) -> Tensor:
    return Tensor(*_expect(tensor, Tensor, "a parameter's data"))


def _ordered_dict(*items: Any) -> State:
    if items:
        raise UnreadableError("an OrderedDict with arguments")
    return State()


CONSTRUCTORS: dict[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Name("torch", "Size"): lambda sizes: _expect_sizes(sizes, "a torch.Size"),
    Name("torch", "device"): lambda *place: str(place),
}

# Names that only stand for themselves.
MARKERS = {
    *(Name(module, name) for name in STORAGES for module in ("torch", "torch.storage")),
    *(Name("torch", name) for name in DTYPES),
}

LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip


class Machine:
    """Interprets the instructions of one pickle, `run` -> the object. `storages` collects what it refers to."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, pickle: io.BytesIO) -> Any:
        """Interpret up to STOP and leave `pickle` behind it."""
        try:
            for opcode, argument, _ in pickletools.genops(pickle):
                self._step(opcode.name, argument)
            return self.stack.pop()
        except UnreadableError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as bad:
            raise UnreadableError(f"malformed pickle ({type(bad).__name__})") from None

    def _step(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in INSTRUCTIONS:
            INSTRUCTIONS[name](self, argument)
        else:
            raise UnreadableError(f"holds the pickle instruction {name}, which no state dict needs; refused")

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _pack(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        if len(items) < size:
            raise IndexError(size)
        del self.stack[-size:]
        self._push(items)

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _append(self, items: list[Any]) -> None:
        _expect(self.stack[-1], list, "what is appended to").extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, State) or len(items) % 2:
            raise UnreadableError("items are set on what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nested tuples as keys would hash recursively, without a limit.
            if type(key) not in (str, int):
                raise UnreadableError(f"a dict key is a {type(key).__name__}")
            target[key] = value

    def _name(self, module: Any, name: Any) -> None:
        known = Name(_expect(module, str, "a module"), _expect(name, str, "a name"))
        if known not in CONSTRUCTORS and known not in MARKERS:
            raise UnreadableError(f"refers to {known}, which no state dict needs; refused without running it")
        self._push(known)

    def _stack_name(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _construct(self, _: Any) -> None:
        arguments, name = self.stack.pop(), _expect(self.stack.pop(), Name, "what is called")
        if name not in CONSTRUCTORS:
            raise UnreadableError(f"calls {name}, which is not a constructor; refused")
        self._push(CONSTRUCTORS[name](*_expect(arguments, tuple, "an argument list")))

    def _build(self, _: Any) -> None:
        self.stack.pop()
        if type(self.stack[-1]) is not State:
            raise UnreadableError("sets attributes of an object other than an OrderedDict; refused")

    def _persistent(self, _: Any) -> None:
        storage = _storage(self.stack.pop())
        known = self.storages.setdefault(storage.key, storage)
        if (known.dtype, known.numel) != (storage.dtype, storage.numel):
            raise UnreadableError(f"storage {storage.key[:40]} is described in two ways")
        self._push(storage)


INSTRUCTIONS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "MARK": Machine._mark,
    "TUPLE": lambda machine, _: machine._push(tuple(machine._to_mark())),
    "TUPLE1": lambda machine, _: machine._pack(1),
    "TUPLE2": lambda machine, _: machine._pack(2),
    "TUPLE3": lambda machine, _: machine._pack(3),
    "PUT": Machine._put,
    "BINPUT": Machine._put,
    "LONG_BINPUT": Machine._put,
    "MEMOIZE": lambda machine, _: machine._put(len(machine.memo)),
    "GET": lambda machine, index: machine._push(machine.memo[index]),
    "BINGET": lambda machine, index: machine._push(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine._push(machine.memo[index]),
    "APPEND": lambda machine, _: machine._append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._to_mark()),
    "SETITEM": lambda machine, _: machine._set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine._set_items(machine._to_mark()),
    "GLOBAL": lambda machine, names: machine._name(*names.split(" ", 1)),
    "STACK_GLOBAL": Machine._stack_name,
    "REDUCE": Machine._construct,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
}


# ---------------------------------------------------------------------------------------------------------------------
# The two layouts: each reader -> (the pickled object, {storage key: (first byte, bytes)})

Regions = dict[str, tuple[int, int]]


def _read_zip(path: Path, mapping: mmap.mmap) -> tuple[Any, Regions]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as bad:
        raise UnreadableError(f"not a readable zip archive ({bad}); download it again") from None
    by_name = {member.filename: member for member in members}
    if len(by_name) < len(members):
        raise UnreadableError("the zip archive holds two members of one name")
    pickles = [name for name in by_name if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise UnreadableError("the zip archive is not of torch.save (one member */data.pkl)")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in by_name:
        raise UnreadableError("is a TorchScript program; only state dicts can be converted")
    order = by_name.get(f"{prefix}byteorder")
    if order is not None and _read_member(mapping, order, 16) != b"little":
        raise UnreadableError("is stored in big-endian byte order, which is not supported")
    machine = Machine()
    value = machine.run(io.BytesIO(_read_member(mapping, by_name[pickles[0]], LONGEST_PICKLE)))
    regions: Regions = {}
    for key in machine.storages:
        if f"{prefix}data/{key}" not in by_name:
            raise UnreadableError(f"storage {key[:40]} is missing from the zip archive")
        regions[key] = _locate_member(mapping, by_name[f"{prefix}data/{key}"])
    return value, regions


def _locate_member(mapping: mmap.mmap, member: zipfile.ZipInfo) -> tuple[int, int]:
    """(first byte, bytes) of a stored member, behind its local header of 30 bytes, name and extra field."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size != member.compress_size:
        raise UnreadableError(f"zip member {member.filename[:80]} is compressed or encrypted, which torch.save never does")
    header = mapping[max(member.header_offset, 0) : max(member.header_offset, 0) + 30]
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UnreadableError(f"zip member {member.filename[:80]} has no local header")
    start = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + member.file_size > len(mapping):
        raise UnreadableError(f"zip member {member.filename[:80]} reaches beyond the end of the file (truncated download?)")
    return start, member.file_size


def _read_member(mapping: mmap.mmap, member: zipfile.ZipInfo, most: int) -> bytes:
    start, size = _locate_member(mapping, member)
    if size > most:
        raise UnreadableError(f"zip member {member.filename[:80]} has {size} bytes; at most {most} are read")
    return mapping[start : start + size]


def _read_legacy(path: Path, mapping: mmap.mmap) -> tuple[Any, Regions]:
    if mapping[:1] != b"\x80":
        _refuse_unknown(mapping[:64])
    machine, position = Machine(), 0
    values = []
    for number in range(5):
        pickle = io.BytesIO(mapping[position : position + LONGEST_PICKLE])
        values.append(machine.run(pickle) if number == 3 else Machine().run(pickle))
        position += pickle.tell()
        if number == 0 and values[0] != LEGACY_MAGIC:
            raise UnreadableError("is a pickle, but not of torch.save")
    _, protocol, system, value, keys = values
    if protocol != LEGACY_PROTOCOL or type(system) is not dict or system.get("little_endian") is not True:
        raise UnreadableError("is of an unknown version of torch.save or in big-endian byte order")
    return value, _legacy_regions(mapping, position, _expect(keys, list, "the list of storages"), machine.storages)


def _legacy_regions(mapping: mmap.mmap, position: int, keys: list[Any], storages: dict[str, Storage]) -> Regions:
    regions: Regions = {}
    for key in keys:
        if type(key) is not str or key not in storages or key in regions:
            raise UnreadableError(f"its list of storages names {str(key)[:40]!r}, which is unknown or stands twice")
        size = storages[key].numel * _itemsize(storages[key].dtype)
        stated = int.from_bytes(mapping[position : position + 8], "little")
        if stated != storages[key].numel:
            raise UnreadableError(f"storage {key[:40]} should have {storages[key].numel} elements and states {stated}")
        if position + 8 + size > len(mapping):
            raise UnreadableError(f"storage {key[:40]} reaches beyond the end of the file (truncated download?)")
        regions[key] = (position + 8, size)
        position += 8 + size
    return regions


def _refuse_unknown(head: bytes) -> NoReturn:
    if head.startswith(b"version https://git-lfs"):
        raise UnreadableError("is a git-lfs pointer, not the file itself; fetch it with: git lfs pull")
    if head.lstrip()[:1] in (b"<", b"{"):
        raise UnreadableError("is text, not a file of torch.save; download it again")
    raise UnreadableError("is not a file of torch.save")


# ---------------------------------------------------------------------------------------------------------------------
# From the pickled object to checked tensors


def _state_dict(value: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The dict of tensors, unwrapped; and the entries beside the tensors or the wrapped dict, which are left out."""
    left_out: list[str] = []
    for _ in range(4):
        if not isinstance(value, dict):
            break
        tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
        if tensors:
            left_out += [one_line(str(name)[:80]) for name in value if name not in tensors]
            return {_tensor_name(name): item for name, item in tensors.items()}, left_out
        wrapper = next((name for name in WRAPPERS if isinstance(value.get(name), dict)), None)
        left_out += [one_line(str(name)[:80]) for name in value if name != wrapper]
        value = value.get(wrapper)
    raise UnreadableError(f"holds no state dict: neither tensors by name, nor such a dict under {', '.join(WRAPPERS)}")


def _tensor_name(name: Any) -> str:
    if type(name) is not str or not name.isprintable() or name == "__metadata__" or len(name) > 1000:
        raise UnreadableError(f"{str(name)[:40]!a} cannot be the name of a tensor")
    return name


def _itemsize(dtype: str) -> int:
    return np.dtype(NUMPY[dtype]).itemsize


def _place(path: Path, mapping: mmap.mmap, name: str, tensor: Tensor, regions: Regions) -> StoredTensor:
    """Check that every element of a tensor lies in its storage, and the storage in the file."""
    storage, itemsize, width = tensor.storage, _itemsize(tensor.dtype), _itemsize(tensor.storage.dtype)
    if storage.key not in regions:
        raise UnreadableError(f"tensor {name}: its storage {storage.key[:40]} is not in the file")
    begin, size = regions[storage.key]
    if storage.numel * width > size:
        raise UnreadableError(f"tensor {name}: its storage needs {storage.numel * width} bytes, the file holds {size}")
    count = storage.length * width // itemsize
    elements = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    if elements and last >= count:
        raise UnreadableError(f"tensor {name}: reaches element {last} of a storage of {count}")
    if elements > count:
        raise UnreadableError(f"tensor {name}: has {elements} elements, more than its storage ({count})")
    start = begin + storage.first * width + tensor.offset * itemsize
    return StoredTensor(path, mapping, tensor.dtype, tensor.shape, tensor.stride, start)
