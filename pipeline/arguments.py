"""Checks of the arguments of the Python interface, with messages like those of a config's keys."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from pipeline.errors import CapabilityError, ConfigError, did_you_mean, first_line


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, or a tensor of one; a boolean is none."""
    if isinstance(value, Tensor):
        fraction = value.is_floating_point() or value.is_complex()
        return value.ndim == 0 and not value.is_meta and value.dtype != torch.bool and not fraction
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Return an integer of numpy or torch as int, and any other value as it is."""
    return int(value) if is_integer(value) else value


def integer(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Check an integer.

    Args:
        name: of the argument.
        value: what was given; a boolean is no integer.
        least: smallest allowed value.
        most: largest allowed value.

    Returns:
        The integer.

    Raises:
        ConfigError: another type, or a value outside the bounds.
    """
    if not is_integer(value) or not least <= value <= most:
        expected = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ConfigError(f"{name}: {value!r}; expected an integer {expected}")
    return int(value)


def number(name: str, value: Any, least: float, most: float) -> float:
    """Check a finite number.

    Args:
        name: of the argument.
        value: what was given; a boolean is no number.
        least: smallest allowed value.
        most: largest allowed value.

    Returns:
        The number.

    Raises:
        ConfigError: another type, nan, or a value outside the bounds.
    """
    numeric = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not numeric or not least <= value <= most:
        raise ConfigError(f"{name}: {value!r}; expected a number from {least:g} to {most:g}")
    return float(value)


def choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check that a value is one of several words.

    Args:
        name: of the argument.
        value: what was given.
        choices: the words.

    Raises:
        ConfigError: another value; names the nearest word.
    """
    if not isinstance(value, str) or value not in choices:
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(choices)}{near}")


def instance(name: str, value: Any, *kinds: type) -> None:
    """Check the type of an argument.

    Args:
        name: of the argument.
        value: what was given.
        *kinds: the allowed types.

    Raises:
        ConfigError: another type.
    """
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{name}: {value!r} is a {type(value).__name__}; expected {expected}")


def text(name: str, value: Any) -> str:
    """Check a text that UTF-8 can write.

    Args:
        name: of the argument.
        value: what was given.

    Returns:
        The text.

    Raises:
        ConfigError: another type, or a text with half of a surrogate pair.
    """
    instance(name, value, str)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name}: {value[error.start]!r} at index {error.start} is half of a surrogate pair; "
            "expected text that UTF-8 can write"
        ) from None
    return value


def device(value: Any) -> torch.device:
    """Check a device.

    Args:
        value: a device or its name; None is the CPU.

    Returns:
        The device.

    Raises:
        CapabilityError: this machine has no such device, or it holds no values.
    """
    try:
        place = torch.empty(0, device=value).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise CapabilityError(f"device: {value!r}: {first_line(error)}") from None
    if place.type == "meta":
        raise CapabilityError(f"device: {value!r} holds no values; expected cpu or cuda")
    return place


def integers(name: str, values: Any, *shape: int | str) -> Tensor:
    """Check and convert an array of integers.

    Args:
        name: of the argument.
        values: a tensor, an array, or lists.
        *shape: the expected sizes; a letter stands for any size.

    Returns:
        An int64 tensor, on the device of a given tensor.

    Raises:
        ConfigError: other values, or another shape.
    """
    tensor = _tensor(name, values, shape)
    other = tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool
    if other and tensor.numel():  # an empty list has no type of its own
        raise ConfigError(f"{name}: values of type {_kind(tensor)}; expected integers")
    return tensor.long()


def booleans(name: str, values: Any, *shape: int | str) -> Tensor:
    """Check and convert an array of booleans, which may be written as 0 and 1.

    Args:
        name: of the argument.
        values: a tensor, an array, or lists.
        *shape: the expected sizes; a letter stands for any size.

    Returns:
        A boolean tensor, on the device of a given tensor.

    Raises:
        ConfigError: other values, or another shape.
    """
    tensor = _tensor(name, values, shape)
    if tensor.dtype != torch.bool and not ((tensor == 0) | (tensor == 1)).all():
        raise ConfigError(f"{name}: values of type {_kind(tensor)}; expected booleans, or 0 and 1")
    return tensor.bool()


def pixels(name: str, values: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Check and convert the pixels of an RGB image.

    Args:
        name: of the argument.
        values: a tensor, an array, or lists.

    Returns:
        [h, w, 3] pixels.

    Raises:
        ConfigError: other values, or another shape.
    """
    image = integers(name, values, "h", "w", 3)
    check_below(name, image, 256)
    if not image.numel():
        raise ConfigError(f"{name}: no pixels; expected [h, w, 3]")
    return image.cpu().numpy().astype(np.uint8)


def check_below(name: str, values: Tensor, end: int) -> None:
    """Check that integers are at least 0 and below a bound.

    Args:
        name: of the argument.
        values: the integers.
        end: the bound.

    Raises:
        ConfigError: names the first value outside.
    """
    outside = values[(values < 0) | (values >= end)]
    if len(outside):
        raise ConfigError(f"{name}: {int(outside[0])}; expected 0 to {end - 1}")


def check_ids(name: str, tokens: Tensor, positions: Tensor, vocab_size: int, bos: int | None) -> None:
    """Check that tokens are ids below V, or BOS at position 0.

    Args:
        name: of the argument.
        tokens: the ids.
        positions: of the tokens, in the same shape.
        vocab_size: V.
        bos: id of BOS, or None.

    Raises:
        ConfigError: names the first id that the model does not read.
    """
    begins = torch.zeros_like(tokens, dtype=torch.bool) if bos is None else (positions == 0) & (tokens == bos)
    check_below(name, tokens[~begins], vocab_size)


def present(name: str, positions: Tensor, lengths: Any, length: int) -> Tensor:
    """Find which positions are no padding, and check them.

    Args:
        name: of the argument.
        positions: padded rows of positions, [B, K].
        lengths: number of positions of every row; None: all of them.
        length: L.

    Returns:
        [B, K] booleans.

    Raises:
        ConfigError: lengths that do not fit, or a position outside the row.
    """
    rows, width = positions.shape
    counts = torch.full((rows,), width)
    if lengths is not None:
        counts = integers(f"{name}: lengths", lengths, "B").cpu()
    if counts.shape != (rows,) or (counts < 0).any() or (counts > width).any():
        raise ConfigError(
            f"{name}: lengths {counts.tolist()[:8]}; expected one of 0 to {width} for each of {rows} rows"
        )
    mask = torch.arange(width) < counts[:, None]
    check_below(name, positions[mask], length)
    return mask


def check_distinct(positions: Tensor, known: Tensor, queries: Tensor, queried: Tensor, length: int) -> None:
    """Check that no position of a row is known twice, or known and queried.

    Args:
        positions: of known tokens, [B, K].
        known: which of them are no padding.
        queries: positions to predict, [B, Q].
        queried: which of them are no padding.
        length: L.

    Raises:
        ConfigError: names the first such position.
    """
    row_starts = torch.arange(len(known))[:, None] * length
    cells, counts = (row_starts + positions)[known].unique(return_counts=True)
    targets = (row_starts + queries)[queried]
    for name, found, problem in (
        ("positions", cells[counts > 1], "known twice; expected each position once"),
        ("queries", targets[torch.isin(targets, cells)], "known; expected unknown positions"),
    ):
        if len(found):
            row, position = divmod(int(found[0]), length)
            raise ConfigError(f"{name}: position {position} of row {row} is {problem}")


def _tensor(name: str, values: Any, shape: tuple[int | str, ...]) -> Tensor:
    """Convert values to a tensor of the given shape."""
    wanted = f"[{', '.join(map(str, shape))}]"
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        why = first_line(error)
        raise ConfigError(f"{name}: no array ({why}); expected integers of shape {wanted}") from None
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "on the meta device" if tensor.is_meta else f"in layout {tensor.layout}"
        raise ConfigError(f"{name}: a tensor {kind}; expected one with values")
    fits = tensor.ndim == len(shape) and all(
        isinstance(size, str) or size == found for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ConfigError(f"{name}: shape {list(tensor.shape)}; expected {wanted}")
    return tensor


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
