"""Read files of `torch.save` as data: nothing that a file names is imported, and nothing that it calls is run.

A pickle is a program. Published checkpoints need four things of it: containers, numbers, strings and tensors.
Every name in a file therefore becomes an inert class of this module. A call of that class runs the function
that `FUNCTIONS` has for its name, or makes an inert object if the name looks like a class, or is refused.

`torch.load(weights_only=True)` with inert classes as `safe_globals` would not do. It reads neither protocols 4
and 5 nor items of classes derived from dict or list, and its list of safe names is shared by all threads.
"""

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

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a torch.save file that is not a zip archive
# Modules of the standard library whose classes hold values. Classes of the others act, so they are refused.
VALUE_MODULES = {"_codecs", "abc", "argparse", "builtins", "collections", "copyreg", "datetime", "decimal"}
VALUE_MODULES |= {"enum", "fractions", "pathlib", "typing", "uuid"}
# Classes, and functions that make an object of a class, whose names do not begin with a capital letter.
LOWERCASE_CLASSES = {f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")}
LOWERCASE_CLASSES |= {"numpy.dtype", "numpy.ndarray"}
LOWERCASE_CLASSES |= {"numpy.core.multiarray._reconstruct", "numpy.core.numeric._frombuffer"}
# Types of a tensor's memory, by their name in torch.
STORAGE_DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16}
STORAGE_DTYPES |= {"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32}
STORAGE_DTYPES |= {"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8}
STORAGE_DTYPES |= {"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128}
STORAGE_DTYPES |= {"BoolStorage": torch.bool, "UntypedStorage": torch.uint8}


class _InertType(type):
    """Type of inert classes. It sees the calls in a file; objects are otherwise made by `__new__`."""

    origin: str

    def __call__(cls, *arguments: Any) -> Any:
        if cls.origin in FUNCTIONS:
            return FUNCTIONS[cls.origin](*arguments)
        if cls.origin in LOWERCASE_CLASSES or cls.__name__.lstrip("_")[:1].isupper():
            return super().__call__(*arguments)
        raise CheckpointError(f"the file calls {cls.origin}, which is not how data is stored; refused")


class InertObject(metaclass=_InertType):
    """An object of a class that is not loaded.

    Attributes:
        origin: full name of the class in the file.
        arguments: what the class would have been called with.
        state: what the object's attributes would have been set from, usually a dict.
        entries: the object's items if its class is a mapping.
        elements: the object's items if its class is a sequence or a set.
    """

    origin = "?"
    arguments: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]
    elements: list[Any]

    def __new__(cls, *arguments: Any, **named: Any) -> "InertObject":
        """Record the arguments, without calling anything."""
        self = super().__new__(cls)
        self.arguments, self.state = (*arguments, *named.values()), None
        self.entries, self.elements = {}, []
        return self

    def __setstate__(self, state: Any) -> None:
        # A file that sets the state of the class itself gets here without `self`, and fails.
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Record an item of a sequence; `add`, which pickles of sets use, does the same."""
        self.elements.append(value)

    add = append


def read_pickle(path: Path) -> Any:
    """Read a file written by `torch.save`, in the current format or in the one before torch 1.6.

    Tensors of the current format are views of the mapped file, so that those that are not used take no memory.

    Args:
        path: the file, which must stay in place as long as its tensors are in use.

    Returns:
        The saved object. Objects of unknown classes in it are `InertObject`s, NumPy scalars are Python numbers.

    Raises:
        CheckpointError: the file calls or names something that is not data (the error gives the name), is
            damaged, or was not written by `torch.save`.
    """
    try:
        with path.open("rb") as file:
            return _read_archive(file) if file.peek().startswith(ZIP_MAGIC) else _read_legacy(file)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        raise CheckpointError(
            f"{path} is damaged, or not a file written by torch.save: {type(error).__name__}: {error}"
        ) from None


def to_plain(value: Any) -> Any:
    """Convert containers and configuration objects to dicts and lists.

    Args:
        value: any value of a file, such as OmegaConf's containers as inert objects.

    Returns:
        Nested dicts and lists. Inert objects that are not containers stay what they are.
    """
    if isinstance(value, InertObject):
        state = value.state if isinstance(value.state, dict) else {}
        if "_content" in state or "_val" in state:  # OmegaConf's containers and leaves
            return to_plain(state.get("_content", state.get("_val")))
        items = value.entries or value.elements
        return to_plain(items) if items else value
    if isinstance(value, dict):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    return value


class _Reader(pickle.Unpickler):
    """The unpickler: `find_class` is the only way by which a file gets hold of anything to call."""

    def __init__(self, file: io.BufferedIOBase, storage: Callable[[Any], Tensor]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def persistent_load(self, key: Any) -> Tensor:
        return self._storage(key)

    def find_class(self, module: str, name: str) -> Any:
        # Protocol 2, torch's default, writes Python 2's names: `commands` is `subprocess`.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        module = module.replace("numpy._core", "numpy.core")  # as NumPy 2 and NumPy 1 call it
        origin, root = f"{module}.{name}", module.partition(".")[0]
        dtype = STORAGE_DTYPES.get(name, vars(torch).get(name)) if root == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if root in sys.stdlib_module_names and root not in VALUE_MODULES:
            raise CheckpointError(f"the file names {origin}, which no data needs; refused")
        return _InertType(name.rpartition(".")[2], (InertObject,), {"origin": origin})


def _read_archive(file: io.BufferedReader) -> Any:
    """Read the current format: a pickle, and one uncompressed entry for the memory of each storage."""
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch expects memory that can be written
    with zipfile.ZipFile(file) as archive:
        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError("no checkpoint: a zip archive without data.pkl")
        if packed := [e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED]:
            raise CheckpointError(f"{packed[0]} is compressed; torch.save writes archives as they are")
        order = f"{roots[0]}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise CheckpointError("written on a big-endian machine; expected little-endian numbers")

        def storage(key: Any) -> Tensor:
            _, dtype, name, _, count = key
            entry = archive.getinfo(f"{roots[0]}data/{name}")
            if not 0 <= count * dtype.itemsize <= entry.file_size:
                raise CheckpointError(f"a storage of {count} values has only {entry.file_size} bytes")
            if count == 0:
                return torch.empty(0, dtype=dtype)
            # The entry's own header: 30 bytes, of which the last four are the lengths of what follows.
            lengths = struct.unpack_from("<HH", data, entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(lengths)
            return torch.frombuffer(data, dtype=dtype, count=count, offset=start)

        return _Reader(io.BytesIO(archive.read(f"{roots[0]}data.pkl")), storage).load()


def _read_legacy(file: io.BufferedReader) -> Any:
    """Read the format before torch 1.6: magic, version, system, object, names of the storages, their memory."""
    storages: dict[str, Tensor] = {}

    def storage(key: Any) -> Tensor:
        _, dtype, name, _, count, *_ = key
        if name not in storages:
            storages[name] = torch.empty(count, dtype=dtype)
        return storages[name]

    def load() -> Any:
        return _Reader(file, storage).load()

    if load() != LEGACY_MAGIC:
        raise CheckpointError("a pickle, but not one written by torch.save")
    _version, _system, content, names = load(), load(), load(), load()
    if set(names) != storages.keys():
        raise CheckpointError("damaged: the list of storages does not name those that tensors use")
    for name in names:
        memory = storages[name].view(torch.uint8).numpy().data
        (count,) = struct.unpack("<q", file.read(8))
        if count != len(storages[name]) or file.readinto(memory) != len(memory):
            raise CheckpointError(f"damaged: storage {name} does not have {len(storages[name])} values")
    return content


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """Do what `torch._utils._rebuild_tensor_v2` does, without gradient flag and hooks."""
    return storage.as_strided(size, stride, offset)


def _rebuild_untyped(storage: Tensor, *place: Any) -> Tensor:
    """Do what `torch._utils._rebuild_tensor_v3` does: the storage is untyped, the seventh argument is its type."""
    return _rebuild_tensor(storage.view(place[5]), *place)


def _scalar(dtype: InertObject, value: bytes) -> int | float | bool:
    """Convert a NumPy number to Python's."""
    big_endian = isinstance(dtype.state, tuple) and dtype.state[1] == ">"
    kind = np.dtype(f"{'>' if big_endian else '<'}{dtype.arguments[0]}")
    if kind.kind not in "biuf":
        raise CheckpointError(f"a NumPy scalar of type {kind}; expected a number")
    return np.frombuffer(value, kind, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """Make bytes from text, which is how protocol 2 stores them."""
    return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_untyped,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch.Size": tuple,
    "torch.device": lambda *names: ":".join(map(str, names)),
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: OrderedDict(),
    "collections.Counter": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": lambda cls, *_: cls.__new__(cls),  # protocols before 2
    "copyreg.__newobj__": lambda cls, *arguments: cls.__new__(cls, *arguments),
    "numpy.core.multiarray.scalar": _scalar,
}
