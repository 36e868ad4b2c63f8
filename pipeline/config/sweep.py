"""A sweep's config: a base run, and a space over its keys from which variants are made."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from pipeline.config.load import Tree, check, listed, merged, override, put, read_chain
from pipeline.config.schema import RunConfig
from pipeline.config.section import Name, Section, Seed
from pipeline.config.space import Entry, Variant, draw, keys_of, one_at_a_time, product, read_entries
from pipeline.errors import ConfigError, did_you_mean

_TRAINING_METRICS = ("train/loss", "train/tokens_per_second")  # reported beside the validation metric
_SET_BY_SWEEP = ("name", "seed", "distill")
# Keys of `overrides`, not of `space`.
_SAME_FOR_ALL = ("cluster.storage", "tracking.uri", "tracking.experiment")
_CHECKED_DRAWS = 16  # draws of a continuous space that are checked before anything starts


class SweepConfig(Section):
    """A sweep, as written in one YAML file.

    Attributes:
        name: Name of the sweep and of its folder in `cluster.storage`; never inherited from `base`.
        base: Config file of the run that all variants start from, or of a sweep to build on.
        overrides: Dotted keys of the run with their values, for all trials.
        space: Dotted keys of the run with the values to try (docs/configuration.md, "The space of a sweep").
        seeds: Seeds with which every variant is trained.
        metric: Metric by which trials are compared.
        mode: Whether the smallest or the largest value of the metric is the best.
        search: `grid` tries all combinations; `one_at_a_time` tries the first value of every entry together, then
            each other value alone in its place; `random` and `optuna` draw variants.
        num_samples: Number of variants that `random` and `optuna` draw.
        scheduler: `asha` stops trials early that are behind the others.
        first_rung: Step at which `asha` first compares trials.
        reduction: `asha` continues one in this many trials, to this many times the steps.
        max_concurrent: Largest number of trials at the same time; null is as many as the cluster holds.
    """

    name: Name
    base: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Any]
    seeds: tuple[Seed, ...] = (0,)
    metric: str = "validation/perplexity"
    mode: Literal["min", "max"] = "min"
    search: Literal["grid", "one_at_a_time", "random", "optuna"] = "grid"
    num_samples: PositiveInt | None = None
    scheduler: Literal["none", "asha"] = "none"
    first_rung: PositiveInt | None = None
    reduction: Annotated[int, Field(ge=2)] = 3
    max_concurrent: PositiveInt | None = None

    @property
    def draws_variants(self) -> bool:
        """Whether variants are drawn from the space instead of listed."""
        return self.search in ("random", "optuna")

    def _conflicts(self) -> Iterator[str]:
        """Yield the problems between the sweep's own keys, as `key: message` lines."""
        if not self.space:
            yield "space: empty; expected at least one entry"
        if not self.seeds:
            yield "seeds: empty; expected at least one"
        elif len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: {list(self.seeds)}; expected each seed once"
        if self.draws_variants and self.num_samples is None:
            yield f"num_samples: missing; expected how many variants search {self.search} draws"
        if not self.draws_variants and self.num_samples is not None:
            yield f"num_samples: {self.num_samples} with search {self.search}, which draws none; expected null"
        if self.search == "optuna" and len(self.seeds) > 1:
            yield f"seeds: {len(self.seeds)} with search optuna, which suggests one trial at a time; expected one"
        if (self.scheduler == "asha") != (self.first_rung is not None):
            expected = "the step of the first comparison" if self.scheduler == "asha" else "null without asha"
            yield f"first_rung: {self.first_rung}; expected {expected}"


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        config: The sweep's own keys.
        tree: The base run as a nested mapping, with the overrides in it.
        entries: The space.
    """

    config: SweepConfig
    tree: Mapping[str, Any]
    entries: tuple[Entry, ...]

    def base(self) -> RunConfig:
        """Return the run that every variant starts from, named like the sweep."""
        config, problems = check(RunConfig, {**self.tree, "name": self.config.name})
        assert config is not None, problems
        return config

    def trial(self, variant: Variant, seed: int) -> RunConfig:
        """Return the run of a variant, without the sweep's folders in it.

        Args:
            variant: The point of the space.
            seed: The run's seed.

        Raises:
            ConfigError: The variant is no valid run.
        """
        config, problems = self._check(variant, f"{variant.name}-seed-{seed}", seed)
        if config is None or problems:
            raise ConfigError(listed(f"{self.config.name}: {variant.label}", problems))
        return config

    def variants(self) -> list[Variant]:
        """Return all variants in order; none for `optuna`, which chooses them while it runs."""
        if self.config.search == "grid":
            return list(product(self.entries))
        if self.config.search == "one_at_a_time":
            return one_at_a_time(self.entries)
        if self.config.search == "random":
            return self.draws(self.config.num_samples or 1)
        return []

    def draws(self, count: int) -> list[Variant]:
        """Return different variants from `count` draws, of which a smaller count gives the first ones."""
        seed = self.config.seeds[0] if self.config.seeds else 0
        drawn = [draw(self.entries, np.random.default_rng([seed, index])) for index in range(count)]
        return list({variant.name: variant for variant in drawn}.values())

    def problems(self) -> list[str]:
        """Return what is wrong with the keys and the runs of this sweep, each problem once."""
        problems = [*self._key_problems()]
        drawn = self.draws(_CHECKED_DRAWS) if self.config.draws_variants else []
        for variant in [Variant(), *self.variants(), *drawn]:
            config, found = self._check(variant, "trial", 0)
            if variant.values:  # the base may lack keys that every variant sets
                problems += found
            if config is not None:
                problems += self._trial_problems(config)
        return list(dict.fromkeys(problems))

    def _check(self, variant: Variant, name: str, seed: int) -> tuple[RunConfig | None, list[str]]:
        """Return the run of a variant, None where it is none, and what is wrong with it."""
        own: dict[str, Any] = {}
        for key, value in variant.values.items():
            put(own, key.split("."), value)
        # As between files, a section of another kind replaces that of the base whole.
        return check(RunConfig, {**merged([own, dict(self.tree)]), "name": name, "seed": seed})

    def _trial_problems(self, run: RunConfig) -> Iterator[str]:
        """Yield what a run lacks to be a trial of this sweep."""
        metric, first_rung, train = self.config.metric, self.config.first_rung, run.train
        reported = (f"validation/{run.validation_metric}", *_TRAINING_METRICS)
        if metric not in reported:
            near = did_you_mean(metric, reported)
            yield f"metric: {metric!r} is never reported; reported are {', '.join(reported)}{near}"
        every = f"train.validate_every {train.validate_every}"
        if train.checkpoint_every != train.validate_every:
            differs = f"{train.checkpoint_every} is not {every}"
            yield f"train.checkpoint_every: {differs}; trials are judged where they save"
        if self.config.scheduler == "asha" and first_rung:
            if first_rung >= train.steps:
                yield f"first_rung: {first_rung} is not below train.steps {train.steps}"
            elif first_rung % train.validate_every:
                nearest = max(1, round(first_rung / train.validate_every)) * train.validate_every
                yield f"first_rung: {first_rung} is no multiple of {every}; nearest that is: {nearest}"

    def _key_problems(self) -> Iterator[str]:
        """Yield what is wrong with the run's keys that `overrides` and `space` set."""
        places = [(f"overrides.{key}", key) for key in self.config.overrides]
        places += [(f"space.{entry.name}", key) for entry in self.entries for key in sorted(keys_of(entry))]
        for (place, key), (other, second) in itertools.combinations(places, 2):
            if place != other and (_within(key, second) or _within(second, key)):
                yield f"{place}: {key} is also given by {other} ({second}); expected one entry a key"
        for place, key in places:
            in_space = place.startswith("space.")
            reserved = (*_SET_BY_SWEEP, *_SAME_FOR_ALL) if in_space else _SET_BY_SWEEP
            if any(_within(key, other) for other in reserved):
                yield f"{place}: {key} is the sweep's own" + ("; expected seeds" if key == "seed" else "")
            if self.config.search == "optuna" and in_space and _within(key, "data"):
                yield f"{place}: {key} with search optuna; expected another search, which prepares all data first"


def _within(key: str, section: str) -> bool:
    """Return whether a dotted key is a section or lies in it."""
    return f"{key}.".startswith(f"{section}.")


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep's config and check every run that it may start.

    Args:
        path: The sweep's YAML file.
        overrides: `key=value` words: keys of the sweep, or dotted keys of all its runs.

    Raises:
        ConfigError: Names all problems at once.
    """
    bases = [word.removeprefix("base=") for word in overrides if word.startswith("base=")]
    chain = read_chain(path, bases[-1] if bases else None)
    count = 1 + sum(1 for _ in itertools.takewhile(_is_sweep, chain[1:]))
    tree = merged(chain[:count]) | {"base": chain[count - 1].get("base")}
    problems = [problem for word in overrides if (problem := override(tree, word, _path_of))]
    config, found = check(SweepConfig, tree)
    problems += found
    if config is None:
        raise ConfigError(listed(str(path), problems))
    entries = tuple(read_entries(config.space, "space", config.search, problems))
    run = merged(chain[count:])
    for key, value in config.overrides.items():
        if problem := put(run, key.split("."), value):
            problems.append(f"overrides.{key}: {problem}")
    sweep = Sweep(config, run, entries)
    problems += sweep.problems()
    if problems:
        raise ConfigError(listed(str(path), list(dict.fromkeys(problems))))
    return sweep


def _is_sweep(tree: Tree) -> bool:
    """Return whether a file holds keys that only sweeps have."""
    return not tree.keys().isdisjoint(SweepConfig.model_fields.keys() - {"name", "base"})


def _path_of(key: str) -> list[str]:
    """Return where an override of a sweep belongs: among its own keys, or in its `overrides`."""
    path = key.split(".")
    return path if path[0] in SweepConfig.model_fields else ["overrides", key]
