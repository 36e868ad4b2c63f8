"""The space of a sweep: entries over dotted config keys, and the variants that they make."""

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
    """One value of a list, or one label of a group: keys that it sets, and entries that exist only with it."""

    label: str
    values: Mapping[str, Any]
    entries: tuple["Entry", ...] = ()


@dataclass(frozen=True)
class Entry:
    """One dimension of the space: a choice between options, or a number between two ends."""

    name: str
    kind: str
    options: tuple[Option, ...] = ()
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Variant:
    """One point of the space.

    Attributes:
        choices: label or number by entry, in the space's order.
        values: what it sets, by dotted key.
        title: for people; empty: all choices.
    """

    choices: Mapping[str, str | float] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""

    @property
    def label(self) -> str:
        """For people: `pooling=mean norm=rms`."""
        return self.title or " ".join(
            f"{_short(name)}={_shown(value)}" for name, value in self.choices.items()
        )

    @property
    def name(self) -> str:
        """For folders: the label's beginning, and a hash of all values."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True, default=str).encode()).hexdigest()[:6]
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.label).strip('-.')[:60]}-{digest}"


def assemble(entries: Sequence[Entry], pick: Callable[[Entry], int | float]) -> Variant:
    """A variant from what `pick` answers: an option's index, or a number."""
    choices: dict[str, str | float] = {}
    values: dict[str, Any] = {}
    for entry in entries:
        answer = pick(entry)
        if not entry.options:
            choices[entry.name] = values[entry.name] = float(answer)
            continue
        option = entry.options[int(answer)]
        inner = assemble(option.entries, pick)
        choices |= {entry.name: option.label, **inner.choices}
        values |= {**option.values, **inner.values}
    return Variant(choices, values)


def draw(entries: Sequence[Entry], rng: np.random.Generator) -> Variant:
    """A variant at random."""

    def pick(entry: Entry) -> int | float:
        if entry.options:
            return int(rng.integers(len(entry.options)))
        if entry.kind == "loguniform":
            return math.exp(rng.uniform(math.log(entry.low), math.log(entry.high)))
        return float(rng.uniform(entry.low, entry.high))

    return assemble(entries, pick)


def product(entries: Sequence[Entry]) -> Iterator[Variant]:
    """All combinations, the last entry fastest."""
    for parts in itertools.product(*(list(_alternatives(entry)) for entry in entries)):
        yield _joined(parts)


def one_at_a_time(entries: Sequence[Entry]) -> list[Variant]:
    """The first alternative of every entry together, then every other one alone in its place."""
    lists = [list(_alternatives(entry)) for entry in entries]
    first = [alternatives[0] for alternatives in lists]
    found = [replace(_joined(first), title="default")]
    for index, alternatives in enumerate(lists):
        for other in alternatives[1:]:
            whole = _joined([*first[:index], other, *first[index + 1 :]])
            found.append(replace(whole, title=other.label))
    return found


def _alternatives(entry: Entry) -> Iterator[Variant]:
    for option in entry.options:
        for inner in product(option.entries):
            yield _joined([Variant({entry.name: option.label}, option.values), inner])


def _joined(parts: Sequence[Variant]) -> Variant:
    choices = {name: value for part in parts for name, value in part.choices.items()}
    return Variant(choices, {key: value for part in parts for key, value in part.values.items()})


def read_entries(space: Mapping[str, Any], where: str, search: str, problems: list[str]) -> Iterator[Entry]:
    """Typed entries; what is wrong with others goes to `problems`."""
    kinds = _DRAWN if search in ("random", "optuna") else ("grid",)
    for name, written in space.items():
        at = f"{where}.{name}"
        kind, value = next(iter(written.items())) if _is_entry(written) else (None, None)
        if kind is None:
            problems.append(f"{at}: {written!r}; expected one of {', '.join(kinds)} with its values")
        elif kind not in _KINDS:
            problems.append(
                f"{at}.{kind}: no such kind{did_you_mean(kind, _KINDS) or '; known: ' + ', '.join(_KINDS)}"
            )
        elif kind not in kinds:
            problems.append(f"{at}: {kind} with search {search}; expected {', '.join(kinds)}")
        elif kind in _LISTED:
            if options := _options(name, value, at, search, problems):
                yield Entry(name, kind, options)
        elif ends := _ends(value, kind, at, problems):
            yield Entry(name, kind, (), *ends)


def _is_entry(written: Any) -> bool:
    return isinstance(written, dict) and len(written) == 1


def _options(name: str, value: Any, at: str, search: str, problems: list[str]) -> tuple[Option, ...]:
    if not value or not isinstance(value, list | dict):
        problems.append(
            f"{at}: {value!r} has no values; expected a list, or a group of labels, of at least one"
        )
        return ()
    if isinstance(value, list):
        labels = [_shown(one) for one in value]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            problems.append(f"{at}: {twice} stands in it twice")
        return tuple(Option(label, {name: one}) for label, one in zip(labels, value, strict=True))
    options = []
    for label, keys in value.items():
        if not isinstance(keys, dict):
            problems.append(f"{at}.{label}: {keys!r}; expected dotted keys with their values")
            continue
        inner = {key: one for key, one in keys.items() if isinstance(one, dict)}
        fixed = {key: one for key, one in keys.items() if key not in inner}
        entries = tuple(read_entries(inner, f"{at}.{label}", search, problems))
        options.append(Option(str(label), fixed, entries))
    return tuple(options)


def _ends(value: Any, kind: str, at: str, problems: list[str]) -> tuple[float, float] | None:
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low < high or not math.isfinite(high - low) or (kind == "loguniform" and low <= 0):
        above = ", both above 0" if kind == "loguniform" else ""
        problems.append(f"{at}: {value!r}; expected [low, high] with low < high{above}")
        return None
    return low, high


def keys_of(entry: Entry) -> set[str]:
    """Config keys that an entry may set."""
    if not entry.options:
        return {entry.name}
    inner = {key for option in entry.options for one in option.entries for key in keys_of(one)}
    return inner | {key for option in entry.options for key in option.values}


def _short(key: str) -> str:
    """model.swap.pooling -> pooling."""
    return key.rpartition(".")[2]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
