"""torch.save files read as data: nothing that a file names is imported, and nothing that it calls is run.

A pickle is a program. Published checkpoints need four things of it: containers, numbers, strings and tensors.
Every name in a file is therefore answered from a short list of our own functions; any other class becomes an
inert value that remembers its name and what the file says of it, and a call of anything else is refused.
"""

import builtins
import io
import mmap
import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a torch.save file that is not a zip archive
# Modules of the standard library whose classes hold values; the others can only be there to do something.
VALUES = {"abc", "argparse", "builtins", "collections", "copyreg", "datetime", "decimal", "enum", "fractions"}
VALUES |= {"pathlib", "typing", "uuid"}
# Classes, or makers of them, that do not look like one: see `_looks_like_class`.
INERT_CALLS = {"numpy.dtype", "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta"}
INERT_CALLS |= {"datetime.timezone", "torch.Generator", "numpy.ndarray"}
INERT_CALLS |= {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
INERT_CALLS |= {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class _Stranger(type):
    """Type of inert classes: tells a call in the file (here) from the making of an object (`__new__`)."""

    origin: str

    def __call__(cls, *arguments: Any) -> Any:
        if not _looks_like_class(cls.origin):
            raise CheckpointError(f"the file calls {cls.origin}, which is not how data is stored; refused")
        return super().__call__(*arguments)


class Inert(metaclass=_Stranger):
    """An object of a class that is not loaded.

    Attributes:
        origin: full name of the class in the file.
        arguments, state: what it would have been made from.
        entries, elements: its items, where the class is a mapping or a sequence.
    """

    origin = "?"
    arguments: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]
    elements: list[Any]

    def __new__(cls, *arguments: Any, **named: Any) -> "Inert":
        self = super().__new__(cls)
        self.arguments, self.state = (*arguments, *named.values()), None
        self.entries, self.elements = {}, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        self.elements.append(value)

    def extend(self, values: Any) -> None:
        self.elements.extend(values)

    def add(self, value: Any) -> None:
        self.elements.append(value)

    def __repr__(self) -> str:
        return f"<inert {self.origin}>"


class _Known:
    """A function of ours under the name by which files call it; files cannot change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise CheckpointError("the file sets attributes of a function; refused")


class _Storage(_Known):
    """Type of a tensor's memory, by its name in torch."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype):
        super().__init__(_refused)
        self.dtype = dtype


def read_pickle(path: Path) -> Any:
    """The content of a file written by `torch.save`, zip archive or older format.

    Tensors are views of the mapped file: they take memory when read, and need the file as long as they live.

    Raises:
        CheckpointError: the file calls or names something that is not data (named), or is no such file.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy: torch wants to write
            if data[:4] == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive:
                    return _read_archive(archive, data)
            return _read_legacy(file, data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        raise CheckpointError(
            f"{path} is damaged, or not a file written by torch.save: {type(error).__name__}: {error}"
        ) from None


def plain(value: Any) -> Any:
    """Containers and configuration objects as dicts and lists; other inert objects stay what they are."""
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        if "_content" in state or "_val" in state:  # OmegaConf's containers and leaves
            return plain(state.get("_content", state.get("_val")))
        if value.entries or value.elements:
            return plain(value.entries or value.elements)
        return value
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


class _Reader(pickle.Unpickler):
    """The unpickler: `find_class` is the only way by which a file gets hold of anything to call."""

    def __init__(self, file: io.BufferedIOBase, storage: Callable[[Any], Tensor | None]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def persistent_load(self, key: Any) -> Tensor | None:
        return self._storage(key)

    def find_class(self, module: str, name: str) -> Any:
        # Protocol 2, torch's default, writes Python 2's names: `commands` is `subprocess`.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in FUNCTIONS:
            return FUNCTIONS[full]
        if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
            return _Storage(STORAGES[name])
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        root = module.partition(".")[0]
        doing = root in sys.stdlib_module_names and root not in VALUES
        if doing or (root == "builtins" and not isinstance(vars(builtins).get(name), type)):
            raise CheckpointError(f"the file names {full}, which no data needs; refused")
        return _Stranger(name.rpartition(".")[2], (Inert,), {"origin": full})


def _looks_like_class(origin: str) -> bool:
    """By its name alone, since looking would mean importing."""
    return origin in INERT_CALLS or origin.rpartition(".")[2].lstrip("_")[:1].isupper()


def _refused(*_: Any) -> Any:
    raise CheckpointError("the file calls a storage type; refused")


def _read_archive(archive: zipfile.ZipFile, data: mmap.mmap) -> Any:
    """Current format: a pickle and one uncompressed entry for the memory of each storage."""
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError("no checkpoint: a zip archive without data.pkl")
    if packed := [e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED]:
        raise CheckpointError(f"{packed[0]} is compressed; torch.save writes archives as they are")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError("written on a big-endian machine; expected little-endian numbers")

    def storage(key: Any) -> Tensor:
        _, kind, name, _, count = key
        entry = archive.getinfo(f"{root}data/{name}")
        names, extras = struct.unpack_from("<HH", data, entry.header_offset + 26)  # of the entry's own header
        return _view(data, kind.dtype, entry.header_offset + 30 + names + extras, count, entry.file_size)

    return _Reader(io.BytesIO(archive.read(pickles[0])), storage).load()


def _read_legacy(file: io.BufferedIOBase, data: mmap.mmap) -> Any:
    """Format before torch 1.6: magic, version, system, object, names of the storages, their memory."""
    file.seek(0)
    if file.read(1) != b"\x80":
        raise CheckpointError("not a file written by torch.save: neither a zip archive nor a pickle")
    file.seek(0)
    kinds: dict[str, torch.dtype] = {}
    places: dict[str, tuple[int, int]] = {}  # storage -> first byte, number of values

    def note(key: Any) -> None:
        kinds[key[2]] = key[1].dtype

    def storage(key: Any) -> Tensor:
        start, count = places[key[2]]
        return _view(data, key[1].dtype, start, count, len(data) - start)

    if _Reader(file, note).load() != LEGACY_MAGIC:
        raise CheckpointError("a pickle, but not one written by torch.save")
    for _ in ("protocol", "system"):
        _Reader(file, note).load()
    # Where a storage lies is only known behind the object that refers to it: read the object twice.
    start = file.tell()
    _Reader(file, note).load()
    names = _Reader(file, note).load()
    position = file.tell()
    for name in names:
        (count,) = struct.unpack_from("<q", data, position)
        places[name] = (position + 8, count)
        position += 8 + count * kinds[name].itemsize
    file.seek(start)
    return _Reader(file, storage).load()


def _view(data: mmap.mmap, dtype: torch.dtype, start: int, count: int, most: int) -> Tensor:
    """`count` values in the file from byte `start` on, flat."""
    if not 0 <= count * dtype.itemsize <= most:
        raise CheckpointError(f"a storage of {count} values has only {most} bytes in the file")
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start)


def _tensor(
    storage: Tensor | None, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor | None:
    """What `torch._utils._rebuild_tensor_v2` makes, without gradient flag and hooks."""
    return None if storage is None else storage.as_strided(size, stride, offset)


def _tensor_of_type(
    storage: Tensor | None,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _gradient: bool,
    _hooks: Any,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor | None:
    """What `torch._utils._rebuild_tensor_v3` makes: its storage is untyped."""
    return None if storage is None else storage.view(dtype).as_strided(size, stride, offset)


def _scalar(dtype: Inert, value: bytes) -> int | float | bool:
    """A NumPy number, as Python's."""
    big = isinstance(dtype.state, tuple) and dtype.state[1] == ">"
    kind = np.dtype(f"{'>' if big else '<'}{dtype.arguments[0]}")
    if kind.kind not in "biuf":
        raise CheckpointError(f"a NumPy scalar of type {kind}; expected a number")
    return np.frombuffer(value, kind, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])


def _rebuilt(cls: type[Inert], *_: Any) -> Inert:
    """How protocols before 2 make an object of a class."""
    return cls.__new__(cls)


def _made(cls: type[Inert], *arguments: Any) -> Inert:
    """How protocol 4 writes what later became an instruction."""
    return cls.__new__(cls, *arguments)


FUNCTIONS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _Known(_tensor),
    "torch._utils._rebuild_tensor_v2": _Known(_tensor),
    "torch._utils._rebuild_tensor_v3": _Known(_tensor_of_type),
    "torch._utils._rebuild_parameter": _Known(lambda tensor, *_: tensor),
    "torch._utils._rebuild_parameter_with_state": _Known(lambda tensor, *_: tensor),
    "torch.Size": _Known(tuple),
    "torch.device": _Known(lambda *names: ":".join(map(str, names))),
    "collections.OrderedDict": _Known(OrderedDict),
    "collections.defaultdict": _Known(lambda *_: OrderedDict()),
    "collections.Counter": _Known(OrderedDict),
    "builtins.set": _Known(set),
    "builtins.frozenset": _Known(frozenset),
    "_codecs.encode": _Known(_encode),
    "copyreg._reconstructor": _Known(_rebuilt),
    "copyreg.__newobj__": _Known(_made),
    "numpy.core.multiarray.scalar": _Known(_scalar),
    "numpy._core.multiarray.scalar": _Known(_scalar),
}
