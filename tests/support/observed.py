"""Training runs inside worker processes, and what tests want to know of them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.errors import PipelineError
from pipeline.models.denoiser import Denoiser
from pipeline.run import Run
from pipeline.runtime.session import PlainSession
from pipeline.training import engine, loop
from tests.support.tiny_runs import tiny

Weights = dict[str, Tensor]
Plant = Callable[[Denoiser], None]


def quick(storage: Path, name: str, dropout: float = 0.0, **train: object) -> RunConfig:
    """A config of the tiny run in which ZeRO-3 really cuts every parameter, and validation is short."""
    return tiny(
        storage,
        name,
        train={"persistent_parameters": 0, **train},
        model={"dropout": dropout},
        evaluation={"rows": 8},
        sampling={"steps": 1},
    )


@dataclass
class Seen:
    """One run of the real loop, as one worker saw it.

    Attributes:
        losses, norms: by number of updates done; the last time counts where a step was repeated.
        weights: full float32 masters after the last update, gathered by DeepSpeed's own functions (rank 0).
        frozen: full weights that are not trained, after the last update (rank 0).
        moments: values that the optimiser of this rank keeps beside the weights.
        average: plain float64 average of such weights over all updates of this start (rank 0, if asked for).
        error: type and message of the PipelineError that ended the run.
        log: the pipeline's log lines.
    """

    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)
    frozen: Weights = field(default_factory=dict)
    moments: int = 0
    average: Weights = field(default_factory=dict)
    error: str | None = None
    log: list[str] = field(default_factory=list)


def train(rank: int, workers: int, configs: list[RunConfig], average: bool = False) -> list[Seen]:
    """Train one run after the other."""
    return [train_one(rank, workers, config, average) for config in configs]


def train_compiled(rank: int, workers: int, configs: list[RunConfig]) -> list[Seen]:
    """Train one run after the other with compiled blocks, although the device is a CPU."""
    with patch.object(engine, "COMPILED", ("cpu",)):
        seen = train(rank, workers, configs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return seen


def train_one(
    rank: int,
    workers: int,
    config: RunConfig,
    average: bool = False,
    plant: Plant | None = None,
    on_publish: Callable[[], None] | None = None,
) -> Seen:
    """Train one run, watching its updates.

    Args:
        average: keep a moving average of all weights.
        plant: does something to every model that the loop builds.
        on_publish: called before every move of a saved checkpoint to the run's folder.
    """
    seen = Seen()
    with _engines(seen, average) as engines, _logging(seen.log), _planting(plant):
        session = _Session(rank, workers, config, engines, seen, on_publish)
        try:
            loop.train(Run(config), session)
        except PipelineError as error:
            seen.error = f"{type(error).__name__}: {error}"
    if rank > 0:
        seen.weights, seen.average, seen.frozen = {}, {}, {}
    return seen


class _Session(PlainSession):
    """Looks at the weights whenever an update is logged, which is after every one."""

    def __init__(
        self,
        rank: int,
        workers: int,
        config: RunConfig,
        engines: list[Any],
        seen: Seen,
        on_publish: Callable[[], None] | None,
    ):
        assert config.train.log_every == 1
        super().__init__(rank, workers, Run(config).folder)
        self._config, self._engines, self._seen, self._on_publish = config, engines, seen, on_publish

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        if self._on_publish:
            self._on_publish()
        super().publish(folder, name, metrics)

    def log(self, metrics: dict[str, float], step: int) -> None:
        seen, decay = self._seen, self._config.train.ema
        seen.losses[step], seen.norms[step] = metrics["train/loss"], metrics["train/gradient_norm"]
        if seen.average or step == self._config.train.steps:
            seen.weights = full_weights(self._engines[-1])
            seen.frozen, seen.moments = frozen_weights(self._engines[-1]), moments(self._engines[-1])
        for name, value in seen.average.items():
            seen.average[name] = decay * value + (1 - decay) * seen.weights[name].double()


@contextmanager
def _engines(seen: Seen, average: bool) -> Iterator[list[Any]]:
    """The engines that the loop makes meanwhile, the newest last."""
    engines: list[Any] = []

    class Engine(loop.Engine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            engines.append(self)
            if average:
                seen.average = {name: value.double() for name, value in full_weights(self).items()}

    original = loop.Engine
    loop.Engine = Engine  # type: ignore[misc]
    try:
        yield engines
    finally:
        loop.Engine = original  # type: ignore[misc]


@contextmanager
def _planting(plant: Plant | None) -> Iterator[None]:
    original = loop.build

    def build(*arguments: Any) -> Denoiser:
        model = original(*arguments)
        if plant:
            plant(model)
        return model

    loop.build = build
    try:
        yield
    finally:
        loop.build = original


def full_weights(engine: loop.Engine) -> Weights:
    """Copies of the full float32 master weights; all ranks call it together."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = {name: value for name, value in engine.model.named_parameters() if value.requires_grad}
    if engine.stage > 0:
        return {name: safe_get_full_fp32_param(value).float().clone() for name, value in named.items()}
    optimiser = engine._engine.optimizer  # at stage 0 every rank has them all
    if isinstance(optimiser, torch.optim.Optimizer):
        return {name: value.detach().clone() for name, value in named.items()}
    masters = [value.detach().clone() for group in optimiser.fp32_groups for value in group]
    assert all(torch.equal(m.bfloat16(), p) for m, p in zip(masters, named.values(), strict=True))
    return dict(zip(named, masters, strict=True))


def moments(engine: loop.Engine) -> int:
    """Values that the optimiser keeps beside the weights, on this rank."""
    kept = [value for state in engine._engine.optimizer.state.values() for value in state.values()]
    return sum(value.numel() for value in kept if isinstance(value, torch.Tensor) and value.dim())


def frozen_weights(engine: loop.Engine) -> Weights:
    """Copies of the full weights that are not trained; all ranks call it together."""
    frozen = {name: value for name, value in engine.model.named_parameters() if not value.requires_grad}
    with engine._gathered([*frozen.values()]):
        return {name: value.detach().float().clone() for name, value in frozen.items()}


@contextmanager
def _logging(lines: list[str]) -> Iterator[None]:
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pipeline")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
