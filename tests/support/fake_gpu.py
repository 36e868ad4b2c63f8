"""A CUDA device whose tensors have shapes and dtypes but no values, and a record of the kernels that it is asked for.

The device exists in processes that `run_with_device` starts. Tensors of the host stay real.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
# Ops that need a value on the host, or whose result has a shape that depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
# Ops without a kernel, beside views.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "lift_fresh"}
# Ops that read or write some entries of their first input.
GATHERS = {"embedding", "index_select", "index", "gather"}
SCATTERS = {"index_put", "_index_put_impl", "index_copy", "index_add", "scatter"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "addmv", "mv", "dot"}


def run_with_device(module: str, folder: Path) -> str:
    """Run a module in a process that has the device, and return what it prints.

    Args:
        module: its name.
        folder: where the library of the device is compiled.
    """
    torch_root, library = Path(torch.__file__).parent, folder / "fake_gpu.so"
    compiler = ["g++", "-shared", "-fPIC", "-std=c++20", str(Path(__file__).with_suffix(".cpp"))]
    compiler += [f"-I{torch_root}/include", f"-L{torch_root}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([*compiler, f"-Wl,-rpath,{torch_root}/lib", "-o", str(library)], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@dataclass(frozen=True)
class Kernel:
    """One launch: its op, the dtypes and dimensions of inputs and results, and the bytes of both, once each."""

    op: str
    inputs: tuple[tuple[torch.dtype, int], ...]
    outputs: tuple[tuple[torch.dtype, int], ...]
    moved: int

    @property
    def is_product(self) -> bool:
        """A matrix product."""
        return self.op in PRODUCTS

    @property
    def is_attention(self) -> bool:
        """A kernel of attention, forward or backward."""
        return "attn" in self.op or "attention" in self.op


@dataclass
class Record(TorchDispatchMode):
    """Everything that the block asks of the device, forward and backward.

    Attributes:
        kernels: of all ops, without views, allocations and copies from the host.
        mixed: ops that read tensors of the host beside tensors of the device, as `op: line`.
        waits: ops for which the host waits until the device is done, as `op: line`.
    """

    kernels: list[Kernel] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op on shapes if it concerns the device, and note it."""
        kwargs, op = kwargs or {}, func._schema.name.split("::")[1].rstrip("_")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here, there = [x for x in inputs if not x.is_cuda], [x for x in inputs if x.is_cuda]
        target = kwargs.get("device")
        if not there and (target is None or torch.device(target).type != "cuda"):
            return func(*args, **kwargs)
        line = _line()
        copies = op in ("_to_copy", "copy")
        if here and there and not copies:
            self.mixed.append(f"{op}: {line}")
        by_mask = op in ("index", "index_put") and any(x.dtype == torch.bool for x in there[1:])
        if op in WAITING or by_mask:
            self.waits.append(f"{op}: {line}")
        blocking = not (kwargs.get("non_blocking") or (op == "copy" and len(args) > 2 and args[2]))
        if copies and blocking and (here or (target is not None and torch.device(target).type == "cpu")):
            self.waits.append(f"{op} between host and device: {line}")
        with self.fake:
            out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        aliases = [result.alias_info for result in func._schema.returns]
        viewed = any(alias is not None and not alias.is_write for alias in aliases)
        if not (viewed or op in FREE or (copies and here)) and any(x.numel() for x in outputs):
            written = [x for x in tree_leaves(kwargs.get("out")) if isinstance(x, Tensor)]
            read = [x for x in there if not any(x is other for other in written)]
            self.kernels.append(Kernel(op, _kinds(there), _kinds(outputs), _moved(op, read, outputs)))
        return out


class _HostCalls(TorchFunctionMode):
    """Replaces calls that ask for a driver before they dispatch an op, by ops that do the same."""

    def __init__(self, record: Record):
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or what stands in for it."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "pin_memory":
            return args[0]
        if name in ("tensor", "as_tensor") and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if name == "new_tensor" and args[0].is_cuda:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(args[0].device)
        if name in ("__getitem__", "__setitem__") and args[0].is_cuda:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            moved = tuple(torch.tensor(i).to(args[0].device) if isinstance(i, list) else i for i in index)
            return func(args[0], moved, *args[2:])
        if name == "scaled_dot_product_attention" and args[0].is_cuda:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """The memory-efficient kernel, since torch asks the driver which one it should choose."""
    bias = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=q.dtype)
    if bias is not None:
        bias = bias.masked_fill(~attn_mask, -torch.inf).expand(*q.shape[:3], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, bias, torch.is_grad_enabled(), 0.0, is_causal)[0]


@contextmanager
def recording() -> Iterator[Record]:
    """Record what a block asks of the device. Its values may not be read."""
    torch.cuda._lazy_init = torch.cuda.synchronize = lambda *_: None  # which ask for a driver
    torch.cuda.get_device_capability = lambda *_: (8, 0)  # type: ignore[assignment]  # has flash kernels
    record = Record()
    with record, _HostCalls(record):
        yield record


def on_device(model: torch.nn.Module, record: Record, dtype: torch.dtype) -> None:
    """Move a model, whose parameters may be on the device "meta", to the device, in place."""

    def moved(x: Tensor) -> Tensor:
        with record.fake:
            return torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device="cuda")

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, torch.nn.Parameter(moved(parameter)))


def _kinds(tensors: list[Tensor]) -> tuple[tuple[torch.dtype, int], ...]:
    """Dtypes and numbers of dimensions."""
    return tuple((x.dtype, x.dim()) for x in tensors)


def _moved(op: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that are read and written, each once."""
    if op in GATHERS:  # as many as are given out, and the indices
        return 2 * sum(map(_size, outputs)) + sum(map(_size, inputs[1:]))
    if op in SCATTERS:
        return 2 * _size(inputs[-1]) + sum(map(_size, inputs[1:-1]))
    if op == "copy":
        return _size(outputs[0]) + _size(inputs[-1])
    if op.endswith("_like") or op in ("fill", "zero"):
        return sum(map(_size, outputs))
    return sum(map(_size, [*inputs, *outputs]))


def _size(x: Tensor) -> int:
    """Bytes of a tensor in memory, where an expanded axis counts once."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return x.element_size() * math.prod(n for n, step in sizes if step) if x.numel() else 0


def _line() -> str:
    """The innermost line of the package that is running; a backward pass has none."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(f"{ROOT}/pipeline"):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward pass"
