"""The space of a sweep: entries over dotted config keys, and the variants that they span."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.errors import did_you_mean

_LISTED, _DRAWN = ("grid", "choice"), ("choice", "uniform", "loguniform")
_KINDS = ("grid", *_DRAWN)


@dataclass(frozen=True)
class Option:
    """One value of an entry's list, or one label of its group.

    Attributes:
        label: The value as text, or the label.
        values: The keys that it sets.
        entries: Entries that exist only with this option.
    """

    label: str
    values: Mapping[str, Any]
    entries: tuple["Entry", ...] = ()


@dataclass(frozen=True)
class Entry:
    """One dimension of the space: a choice between options, or a number in a range.

    Attributes:
        name: A dotted config key, or a name of the user's own for a group.
        kind: One of grid, choice, uniform, loguniform.
        options: The options of a grid or choice.
        low: The lower end of a range.
        high: The upper end of a range.
    """

    name: str
    kind: str
    options: tuple[Option, ...] = ()
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Variant:
    """One point of the space.

    Attributes:
        choices: Label or number by entry, in the space's order.
        values: What it sets, by dotted key.
        title: Replaces the choices in the label.
    """

    choices: Mapping[str, str | float] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""

    @property
    def label(self) -> str:
        """The choices as text, for example `pooling=mean norm=rms`."""
        choices = (f"{name.rpartition('.')[2]}={_text(value)}" for name, value in self.choices.items())
        return self.title or " ".join(choices)

    @property
    def name(self) -> str:
        """A name for folders: the beginning of the label, and a hash of all values."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True, default=str).encode()).hexdigest()[:6]
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.label).strip('-.')[:60]}-{digest}"


def assemble(entries: Sequence[Entry], pick: Callable[[Entry], int | float]) -> Variant:
    """Make a variant of one choice per entry.

    Args:
        entries: The space.
        pick: Gives the index of an option, or the number of a range.
    """
    parts = []
    for entry in entries:
        picked = pick(entry)
        if entry.options:
            option = entry.options[int(picked)]
            parts += [Variant({entry.name: option.label}, option.values), assemble(option.entries, pick)]
        else:
            parts.append(Variant({entry.name: float(picked)}, {entry.name: float(picked)}))
    return _join(parts)


def draw(entries: Sequence[Entry], rng: np.random.Generator) -> Variant:
    """Draw a variant at random."""

    def pick(entry: Entry) -> int | float:
        if entry.options:
            return int(rng.integers(len(entry.options)))
        if entry.kind == "loguniform":
            return math.exp(rng.uniform(math.log(entry.low), math.log(entry.high)))
        return float(rng.uniform(entry.low, entry.high))

    return assemble(entries, pick)


def product(entries: Sequence[Entry]) -> Iterator[Variant]:
    """Yield all combinations; the last entry changes fastest."""
    return map(_join, itertools.product(*map(_alternatives, entries)))


def one_at_a_time(entries: Sequence[Entry]) -> list[Variant]:
    """Return the first alternative of every entry together, then every other one alone in its place."""
    alternatives = [_alternatives(entry) for entry in entries]
    first = [variants[0] for variants in alternatives]
    result = [replace(_join(first), title="default")]
    for index, variants in enumerate(alternatives):
        for other in variants[1:]:
            result.append(replace(_join([*first[:index], other, *first[index + 1 :]]), title=other.label))
    return result


def _alternatives(entry: Entry) -> list[Variant]:
    """List what an entry alone can be."""
    return [
        _join([Variant({entry.name: option.label}, option.values), inner])
        for option in entry.options
        for inner in product(option.entries)
    ]


def _join(parts: Sequence[Variant]) -> Variant:
    """Join variants of different entries into one."""
    choices = {name: value for part in parts for name, value in part.choices.items()}
    return Variant(choices, {key: value for part in parts for key, value in part.values.items()})


def read_entries(space: Mapping[str, Any], where: str, search: str, problems: list[str]) -> Iterator[Entry]:
    """Yield the typed entries of a space.

    Args:
        space: The space as written.
        where: The key under which it stands, for messages.
        search: The sweep's search, which determines the kinds of entries that are allowed.
        problems: Receives what is wrong with the entries that are left out.
    """
    for name, written in space.items():
        try:
            yield _entry(name, written, f"{where}.{name}", search, problems)
        except ValueError as error:
            problems.append(f"{where}.{name}{error}")


def _entry(name: str, written: Any, place: str, search: str, problems: list[str]) -> Entry:
    """Return one typed entry; a ValueError says what is wrong with it as a whole."""
    kinds = _DRAWN if search in ("random", "optuna") else ("grid",)
    if not isinstance(written, dict) or len(written) != 1:
        raise ValueError(f": {written!r}; expected one of {', '.join(kinds)} with its values")
    ((kind, value),) = written.items()
    if kind not in _KINDS:
        near = did_you_mean(kind, _KINDS) or f"; known: {', '.join(_KINDS)}"
        raise ValueError(f".{kind}: no such kind{near}")
    if kind not in kinds:
        raise ValueError(f": {kind} with search {search}; expected {', '.join(kinds)}")
    if kind not in _LISTED:
        return Entry(name, kind, (), *_ends(value, kind))
    options = tuple(_options(name, value, place, search, problems)) if isinstance(value, list | dict) else ()
    if not options:
        raise ValueError(f": {value!r} has no values; expected a list, or a group of labels, of at least one")
    labels = [option.label for option in options]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        problems.append(f"{place}: {repeated[0]} is listed twice")
    return Entry(name, kind, options)


def _options(name: str, values: Any, place: str, search: str, problems: list[str]) -> Iterator[Option]:
    """Yield the options of a list of values, or of a group of labels."""
    if isinstance(values, list):
        yield from (Option(_text(value), {name: value}) for value in values)
        return
    for label, keys in values.items():
        if not isinstance(keys, dict):
            problems.append(f"{place}.{label}: {keys!r}; expected dotted keys with their values")
            continue
        inner = {key: value for key, value in keys.items() if isinstance(value, dict)}
        fixed = {key: value for key, value in keys.items() if key not in inner}
        yield Option(str(label), fixed, tuple(read_entries(inner, f"{place}.{label}", search, problems)))


def _ends(value: Any, kind: str) -> tuple[float, float]:
    """Return the ends of a range."""
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if low < high and math.isfinite(high - low) and (kind == "uniform" or low > 0):
        return low, high
    above = ", both above 0" if kind == "loguniform" else ""
    raise ValueError(f": {value!r}; expected [low, high] with low < high{above}")


def keys_of(entry: Entry) -> set[str]:
    """Return the config keys that an entry may set."""
    if not entry.options:
        return {entry.name}
    inner = {key for option in entry.options for nested in option.entries for key in keys_of(nested)}
    return inner | {key for option in entry.options for key in option.values}


def _text(value: Any) -> str:
    """Return a value as it stands in labels."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
