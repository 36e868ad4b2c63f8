"""torch.save files are read as data: what they name is not imported, what they call is not run."""

import io
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models.released.pickles import InertObject, read_pickle, to_plain

FORMATS = {
    "zip": {},
    "protocol 4": {"pickle_protocol": 4},
    "protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
DTYPES += [torch.int16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16]


@pytest.fixture
def foreign() -> Iterator[types.ModuleType]:
    """A module that exists while a file is written, and not when it is read."""
    module = types.ModuleType("foreign_configs")
    source = """
class Node:
    def __init__(self, value, parent=None):
        self.__dict__.update(_val=value, _parent=parent, _flags_cache=None)
    def __getstate__(self):
        return dict(self.__dict__)
    def __setstate__(self, state):
        raise SystemExit("a foreign class ran")
class Mapping(Node):
    def __init__(self, content, parent=None):
        items = {key: (Mapping(v, self) if isinstance(v, dict) else Node(v, self)) for key, v in content.items()}
        self.__dict__.update(_content=items, _parent=parent, _metadata=dict)
class Attributes(dict):
    pass
class Names(list):
    pass
class Colour:
    def __reduce__(self):
        return Colour, (3, "red")
"""
    exec(source, module.__dict__)
    sys.modules["foreign_configs"] = module
    yield module
    sys.modules.pop("foreign_configs", None)


def forget(module: types.ModuleType) -> None:
    sys.modules.pop(module.__name__)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_tensors_and_values_come_back(tmp_path: Path, options: dict[str, Any]) -> None:
    base = torch.arange(24.0)
    content = {
        "by dtype": [torch.ones(3).to(dtype) for dtype in DTYPES],
        "views": (base.view(4, 6).t(), base[3:7], base[::5], base.expand(2, 24)),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "state": OrderedDict(a=torch.zeros(2)),
        "values": (1, -(2**70), 1.5, "text é", b"\xff\x00", None, True, {1, 2}, frozenset({3})),
        "numpy": [np.float64(2.5), np.int32(-3), np.bool_(True)],
        "torch": [torch.bfloat16, torch.Size([2, 3]), torch.device("cpu")],
    }
    content["state"]._metadata = OrderedDict(version=1)
    torch.save(content, tmp_path / "a.ckpt", **options)
    read = read_pickle(tmp_path / "a.ckpt")
    for got, expected in zip(read["by dtype"], content["by dtype"], strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    for got, expected in zip(read["views"], content["views"], strict=True):
        assert torch.equal(got, expected)
    assert read["empty"].shape == (0, 3)
    assert read["scalar"].item() == 7
    assert torch.equal(read["parameter"], torch.ones(2))
    assert torch.equal(read["state"]["a"], torch.zeros(2))
    assert read["values"] == content["values"]
    assert read["numpy"] == [2.5, -3, True]
    assert [type(value) for value in read["numpy"]] == [float, int, bool]
    assert read["torch"] == [torch.bfloat16, (2, 3), "cpu"]


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_unknown_classes_become_inert(
    tmp_path: Path, foreign: types.ModuleType, options: dict[str, Any]
) -> None:
    config = foreign.Mapping({"model": {"length": 16, "mode": "learn+freqs"}, "seed": 1})
    content = {
        "config": config,
        "attributes": foreign.Attributes(a=1),
        "names": foreign.Names(["x", "y"]),
        "colour": foreign.Colour(),
        "array": np.arange(3.0),
        "weights": torch.ones(2),
    }
    torch.save(content, tmp_path / "a.ckpt", **options)
    forget(foreign)
    read = read_pickle(tmp_path / "a.ckpt")
    assert "foreign_configs" not in sys.modules
    assert torch.equal(read["weights"], torch.ones(2))
    assert isinstance(read["config"], InertObject)
    assert read["config"].origin == "foreign_configs.Mapping"
    assert to_plain(read["config"]) == {"model": {"length": 16, "mode": "learn+freqs"}, "seed": 1}
    assert to_plain(read["attributes"]) == {"a": 1}
    assert to_plain(read["names"]) == ["x", "y"]
    assert read["colour"].arguments == (3, "red")
    assert isinstance(read["array"], InertObject)


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(mark: Path) -> dict[str, tuple[Any, str]]:
    """What would write to `mark` if it ran, and the name that the refusal must give."""
    import functools
    import importlib
    import operator
    import os
    import runpy
    import subprocess

    write = f"open({str(mark)!r}, 'w').write('ran')"
    return {
        "os.system": (Calls(os.system, f"touch {mark}"), "system"),
        "eval": (Calls(eval, write), "builtins.eval"),
        "exec": (Calls(exec, write), "builtins.exec"),
        "open": (Calls(open, str(mark), "w"), "open"),
        "getattr": (Calls(getattr, "x", "upper"), "builtins.getattr"),
        "import": (Calls(__import__, "os"), "builtins.__import__"),
        "importlib": (Calls(importlib.import_module, "os"), "importlib.import_module"),
        "Popen": (Calls(subprocess.Popen, ["touch", str(mark)]), "subprocess.Popen"),
        "runpy": (Calls(runpy.run_path, "x.py"), "runpy.run_path"),
        "partial": (Calls(functools.partial, eval, write), "functools.partial"),
        "operator": (Calls(operator.attrgetter, "system"), "operator.attrgetter"),
        "torch.load": (Calls(torch.load, str(mark)), "torch.serialization.load"),
        "own function": (Calls(read_pickle, mark), "pipeline.models.released.pickles.read_pickle"),
        "map": (Calls(map, "x", []), "builtins.map"),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 4"])
@pytest.mark.parametrize("kind", sorted(attacks(Path("x"))))
def test_calls_are_refused_and_not_run(tmp_path: Path, kind: str, form: str) -> None:
    mark = tmp_path / "ran"
    attack, name = attacks(mark)[kind]
    # Deep inside, behind good content, where a reader that runs things would have run it.
    content = {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": [{"x": (1, [attack])}]}
    torch.save(content, tmp_path / "a.ckpt", **FORMATS[form])
    mark.unlink(missing_ok=True)  # `open` as an argument of the test itself
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_pickle(tmp_path / "a.ckpt")
    assert not mark.exists()


def archive(path: Path, program: bytes) -> Path:
    """A zip file as torch.save makes it, with a pickle written by hand."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", program)
        file.writestr("a/data/0", struct.pack("<2f", 1, 2))
    return path


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "os.system"),
        (b"(S'true'\nios\nsystem\n.", "os.system"),  # protocol 0: INST
        (b"(cos\nsystem\nS'true'\no.", "os.system"),  # OBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "os.system"),
        (b"\x80\x02cforeign\nrun_this\n)R.", "foreign.run_this"),
        (b"\x80\x02cforeign\nThing\n)R(X\x01\x00\x00\x00xX\x01\x00\x00\x00ytR.", "TypeError"),  # call an inert
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", "TypeError"),  # change a function
        (b"\x80\x02cforeign\nrun_this\nN}X\x06\x00\x00\x00originX\x01\x00\x00\x00Xs\x86b.", "TypeError"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "not callable"),
        (b"\x80\x02cforeign\nThing\n}X\x01\x00\x00\x00aK\x01sb.", "TypeError"),  # change a class
        (b"\x80\x02\x82\x01.", "unregistered extension"),
        (b"\x80\x02]q\x00", "damaged"),
        (b"", "damaged"),
    ],
)  # fmt: skip
def test_programs_written_by_hand(tmp_path: Path, program: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_pickle(archive(tmp_path / "a.ckpt", program))


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path) -> None:
    """Sizes in a file are claims: two values are there."""

    def tensor(count: int, size: int) -> bytes:
        storage = (
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"
        )
        shape = b"K\x00K%c\x85K\x01\x85\x89N"  # offset, size, stride, gradient, hooks
        start = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        return start + storage % count + shape % size + b"tR."

    assert read_pickle(archive(tmp_path / "a.ckpt", tensor(2, 2))).tolist() == [1, 2]
    with pytest.raises(CheckpointError, match="out of bounds"):
        read_pickle(archive(tmp_path / "b.ckpt", tensor(2, 3)))
    with pytest.raises(CheckpointError, match="200 values has only 8 bytes"):
        read_pickle(archive(tmp_path / "c.ckpt", tensor(200, 3)))


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04 and no more", b"\x80\x02cos\nsystem\n."]
)
def test_what_is_no_checkpoint_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        read_pickle(tmp_path / "a.ckpt")


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_truncated_file_says_so(tmp_path: Path, form: str) -> None:
    memory = io.BytesIO()
    torch.save({"a": torch.randn(1000)}, memory, **FORMATS[form])
    (tmp_path / "a.ckpt").write_bytes(memory.getvalue()[:-700])
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        read_pickle(tmp_path / "a.ckpt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A few bytes must not become many."""
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"N" * 10_000 + b".")
    with pytest.raises(CheckpointError, match=r"a/data\.pkl is compressed"):
        read_pickle(tmp_path / "a.ckpt")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_pickle(tmp_path / "a.ckpt")
