"""A sweep's file: a base run, and a space over its keys from which variants are made."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, ValidationError

from pipeline.config.load import check, explain, listed, override, put, read_tree
from pipeline.config.schema import RunConfig
from pipeline.config.section import NonNegativeInt, Section
from pipeline.config.space import Entry, Variant, draw, keys_of, one_at_a_time, product, read_entries
from pipeline.errors import ConfigError, did_you_mean

_TRAINING = ("train/loss", "train/tokens_per_second")  # reported beside the validation's metric
_OWN = ("name", "seed", "distill", "cluster.storage", "tracking.uri", "tracking.experiment")
_TRIED = 16  # draws of a continuous space that are checked before anything starts


class SweepConfig(Section):
    """A sweep, as written in one YAML file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    base: str  # a run's config file; a relative path starts at the sweep's file
    overrides: dict[str, Any] = Field(default_factory=dict)  # dotted keys of all trials
    # dotted key: {grid | choice: [values]} or {uniform | loguniform: [low, high]}; a name of your own:
    # {grid | choice: {label: {dotted key: value, or again such an entry}}}
    space: dict[str, Any]
    seeds: tuple[NonNegativeInt, ...] = (0,)  # of every variant
    metric: str = "validation/perplexity"
    mode: Literal["min", "max"] = "min"
    # grid: all combinations; one_at_a_time: the first of every grid, and every other value alone beside it
    search: Literal["grid", "one_at_a_time", "random", "optuna"] = "grid"
    num_samples: PositiveInt | None = None  # variants that random and optuna draw
    scheduler: Literal["none", "asha"] = "none"
    first_rung: PositiveInt | None = None  # asha: the step at which trials are first compared
    reduction: Annotated[int, Field(ge=2)] = 3  # asha: one in so many goes on, to so many times the steps
    max_concurrent: PositiveInt | None = None  # trials at the same time; None: what the cluster holds


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: the file, the base run's tree with the overrides in it, the space."""

    config: SweepConfig
    tree: Mapping[str, Any]
    entries: tuple[Entry, ...]

    def base(self) -> RunConfig:
        """The run that every variant starts from."""
        config, found = check({**self.tree, "name": self.config.name})
        assert config is not None, found
        return config

    def trial(self, variant: Variant, seed: int) -> RunConfig:
        """The run of a variant, without the sweep's folders in it.

        Raises:
            ConfigError: it cannot be run.
        """
        config, found = check(self._tree(variant) | {"name": f"{variant.name}-seed-{seed}", "seed": seed})
        if config is None or found:
            raise ConfigError(listed(f"{self.config.name}: {variant.label}", found))
        return config

    def variants(self) -> list[Variant]:
        """All variants in their order; those of `optuna` are not known before it has seen results."""
        if self.config.search == "grid":
            return list(product(self.entries))
        if self.config.search == "one_at_a_time":
            return one_at_a_time(self.entries)
        if self.config.search == "random":
            return self.draws(self.config.num_samples or 1)
        return []

    def draws(self, count: int) -> list[Variant]:
        """Variants drawn from generators of (first seed, index), so that more of them begin with the same."""
        seed = self.config.seeds[0] if self.config.seeds else 0
        drawn = [draw(self.entries, np.random.default_rng([seed, index])) for index in range(count)]
        return list({variant.name: variant for variant in drawn}.values())

    def _tree(self, variant: Variant) -> dict[str, Any]:
        tree = deepcopy(dict(self.tree))
        for key, value in variant.values.items():
            put(tree, key, value)
        return tree

    def problems(self) -> list[str]:
        """What is wrong with the runs of this space, each problem once."""
        found: dict[str, None] = {}
        tried = self.draws(_TRIED) if self.config.search in ("random", "optuna") else []
        for variant in [Variant(), *self.variants(), *tried]:
            config, problems = check(self._tree(variant) | {"name": "trial", "seed": 0})
            if variant.values:  # the base may lack what every variant has
                found |= dict.fromkeys(problems)
            if config is not None:
                found |= dict.fromkeys(self._trial_problems(config))
        return list(found)

    def _trial_problems(self, config: RunConfig) -> Iterator[str]:
        """What a sweep asks of a run beside its being one."""
        own, train = self.config, config.train
        reported = (f"validation/{config.validation_metric}", *_TRAINING)
        if own.metric not in reported:
            near = did_you_mean(own.metric, reported)
            yield f"metric: {own.metric!r} is never reported; reported are {', '.join(reported)}{near}"
        if train.checkpoint_every != train.validate_every:
            yield (
                f"train.checkpoint_every: {train.checkpoint_every} is not train.validate_every "
                f"{train.validate_every}; in a sweep trials are judged where they save"
            )
        if own.scheduler == "asha" and own.first_rung:
            if own.first_rung >= train.steps:
                yield f"first_rung: {own.first_rung} is not below train.steps {train.steps}"
            elif own.first_rung % train.validate_every:
                near_step = max(1, round(own.first_rung / train.validate_every)) * train.validate_every
                yield (
                    f"first_rung: {own.first_rung} is no multiple of train.validate_every "
                    f"{train.validate_every}; nearest that is: {near_step}"
                )


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep's file and check every run that it may start.

    Args:
        overrides: `key=value` words: keys of the sweep, or dotted ones of all its runs.

    Raises:
        ConfigError: names every problem at once.
    """
    tree, problems = read_tree(path), []
    for word in overrides:
        own = word.partition("=")[0].split(".")[0] in SweepConfig.model_fields
        if own:
            problem = override(tree, word)
        else:
            key, _, _ = word.partition("=")
            holder: dict[str, Any] = {}
            problem = override(holder, word)
            if not problem:
                tree.setdefault("overrides", {})[key] = _at(holder, key)
        problems += [problem] if problem else []
    try:
        config = SweepConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            listed(str(path), problems + [explain(item, SweepConfig) for item in error.errors()])
        ) from None
    entries = tuple(read_entries(config.space, "space", config.search, problems))
    problems += _own_problems(config, entries)
    file = Path(config.base).expanduser()
    file = file if file.is_absolute() else Path(path).parent / file
    sweep = Sweep(config, {}, entries)
    try:
        base = read_tree(file)
    except ConfigError as error:
        problems.append(f"base: {error}")
    else:
        for key, value in config.overrides.items():
            if problem := put(base, key, value):
                problems.append(f"overrides.{key}: {problem}")
        sweep = Sweep(config, base, entries)
        problems += sweep.problems()
    if problems:
        raise ConfigError(listed(str(path), list(dict.fromkeys(problems))))
    return sweep


def _own_problems(config: SweepConfig, entries: Sequence[Entry]) -> Iterator[str]:
    """What is wrong with the sweep's own keys."""
    if not config.space:
        yield "space: empty; expected at least one entry"
    if not config.seeds:
        yield "seeds: empty; expected at least one"
    elif len(set(config.seeds)) < len(config.seeds):
        yield f"seeds: {list(config.seeds)}; expected each seed once"
    drawn = config.search in ("random", "optuna")
    if drawn and config.num_samples is None:
        yield f"num_samples: missing; expected how many variants search {config.search} draws"
    if not drawn and config.num_samples is not None:
        yield f"num_samples: {config.num_samples} with search {config.search}, which draws none; expected null"
    if config.search == "optuna" and len(config.seeds) > 1:
        yield f"seeds: {len(config.seeds)} of them with search optuna; expected one, since it suggests trials"
    if (config.scheduler == "asha") != (config.first_rung is not None):
        expected = "the step of the first comparison" if config.scheduler == "asha" else "null without asha"
        yield f"first_rung: {config.first_rung}; expected {expected}"
    given: list[tuple[str, str]] = [(f"overrides.{key}", key) for key in config.overrides]
    for entry in entries:
        given += [(f"space.{entry.name}", key) for key in sorted(keys_of(entry))]
    for (place, key), (other, second) in itertools.combinations(given, 2):
        if place != other and (f"{key}.".startswith(f"{second}.") or f"{second}.".startswith(f"{key}.")):
            yield f"{place}: {key} is also given by {other} ({second}); expected one entry a key"
    for place, key in given:
        own = next((own for own in _OWN if f"{key}.".startswith(f"{own}.")), None)
        shared = (
            place.startswith("overrides.") and own is not None and own.startswith(("cluster", "tracking"))
        )
        if own is not None and not shared:
            yield f"{place}: {key} is the sweep's own" + ("; expected seeds" if own == "seed" else "")
        if config.search == "optuna" and place.startswith("space.") and key.split(".")[0] == "data":
            yield f"{place}: {key} with search optuna; expected another search, which prepares all data first"


def _at(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node[part]
    return node
