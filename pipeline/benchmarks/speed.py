"""How fast models train and sample: cases timed in turn, beside the rooflines of the same run."""

import logging
import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from pipeline.benchmarks.dense_baseline import dense_loss, sample_every_hidden, sample_every_position
from pipeline.benchmarks.phases import PhaseTimer
from pipeline.benchmarks.roofline import clock, matmul_peak, roofline
from pipeline.config.benchmark import BenchmarkConfig, SamplingCase, TrainingCase
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.models import build
from pipeline.models.denoiser import Batch, Denoiser
from pipeline.models.flops import Work, flops, sampling_work, training_work
from pipeline.models.pgm import PGM
from pipeline.sampling.orders import step_counts
from pipeline.sampling.sampler import SamplingRequest, sample

log = logging.getLogger(__name__)

SEED = 0
_CPU = torch.device("cpu")
AnyCase = TrainingCase | SamplingCase


@dataclass
class Measured:
    """What was found of one case; lists have an entry a turn.

    Attributes:
        parameters: of the model.
        seconds: of a step, or of drawing the batch.
        flops: needed; None for the plainer forms, and where the number of tokens a step is drawn.
        roofline: seconds of its operations, each alone.
        share_of_peak: needed FLOPs a second over those of the 2048-cube product of the same turn.
        parts: seconds by part.
        peak_mib: growth of the process by one step or draw, MiB.
        peak_mib_large: the same with the larger vocabulary.
    """

    label: str
    parameters: int
    sequences: int
    tokens: int
    flops: int | None = None
    seconds: list[float] = field(default_factory=list)
    roofline: list[float] = field(default_factory=list)
    share_of_peak: list[float] = field(default_factory=list)
    parts: list[Mapping[str, float]] = field(default_factory=list)
    peak_mib: float | None = None
    peak_mib_large: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def share_of_roofline(self) -> float | None:
        """Median over turns of roofline / time."""
        if not self.roofline:
            return None
        return statistics.median(r / s for r, s in zip(self.roofline, self.seconds, strict=True))

    @property
    def split(self) -> dict[str, float]:
        """Share of every part in the time, from medians."""
        names = {name for turn in self.parts for name in turn}
        middle = {n: statistics.median(turn.get(n, 0.0) for turn in self.parts) for n in names}
        return {name: value / sum(middle.values()) for name, value in middle.items()}


@dataclass(frozen=True)
class _Runner:
    """A case that is ready to run: `run` gives seconds by part, `warm` is a short form of it."""

    run: Callable[[], Mapping[str, float]]
    warm: Callable[[], object]
    work: Work | None
    backward: bool
    into: Measured


def measure(config: BenchmarkConfig, traces: Path | None = None) -> tuple[list[Measured], list[float]]:
    """Time all cases of a config in turn.

    Args:
        traces: folder for profiler traces, or None.

    Returns:
        what was found of every case, and the peak of every turn, FLOP/s of the 2048-cube product.
    """
    torch.set_num_threads(config.threads)
    now = clock(config.clock)
    found: list[Measured] = []
    peaks: list[float] = []
    for cases, turns in (
        (config.training, config.repetitions),
        (config.sampling, config.sampling_repetitions),
    ):
        models = {case.model: _model(config, case.model) for case in cases}
        stopwatches = {name: PhaseTimer(model, now) for name, model in models.items()}
        runners = [_runner(config, case, models[case.model], stopwatches[case.model]) for case in cases]
        for runner in runners:
            runner.warm()
        for turn in range(turns if cases else 0):
            peaks.append(matmul_peak(now))
            for runner in runners:
                _turn(runner, peaks[-1], now)
                log.info(
                    "turn %d of %d: %s %.3g s", turn + 1, turns, runner.into.label, runner.into.seconds[-1]
                )
        found += [runner.into for runner in runners]
        if traces is not None:
            _trace(runners, traces)
    if config.memory:
        for case, one in zip(config.cases, found, strict=True):
            one.peak_mib = peak_memory(config, case)
            log.info("%s: peak %.0f MiB", case.label, one.peak_mib)
            if isinstance(case, TrainingCase):
                large = config.model_copy(update={"vocabulary": config.memory_vocabulary})
                one.peak_mib_large = peak_memory(large, case)
    return found, peaks


def first_step(config: BenchmarkConfig) -> Callable[[], object]:
    """The step of the first training case, on its own."""
    case = config.training[0]
    model = _model(config, case.model)
    return training_step(config, case, model, PhaseTimer(model, clock(config.clock)))


def _turn(runner: _Runner, peak: float, now: Callable[[], float]) -> None:
    parts = runner.run()
    into = runner.into
    into.parts.append(parts)
    into.seconds.append(sum(parts.values()))
    if runner.work is not None and into.flops is not None:
        into.roofline.append(roofline(runner.work, runner.backward, now))
        into.share_of_peak.append(into.flops / into.seconds[-1] / peak)


def _model(config: BenchmarkConfig, name: str) -> Denoiser:
    """Freshly initialised, and every parameter moved: gates and heads that are zero would be no test."""
    torch.manual_seed(SEED)
    model = build(config.models[name], config.vocabulary, config.length)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _runner(config: BenchmarkConfig, case: AnyCase, model: Denoiser, parts: PhaseTimer) -> _Runner:
    parameters = sum(p.numel() for p in model.parameters())
    into = Measured(case.label, parameters, config.batch, config.batch * config.length)
    section = config.models[case.model]
    if isinstance(case, TrainingCase):
        step = training_step(config, case, model, parts)
        work = None
        if case.form == "own":
            work = training_work(section, config.vocabulary, _draws(config).groups)
    else:
        step = _drawing(config, case, model, parts, config.steps)
        work = None
        if case.form == "own" and case.order == "uniform" and section.kind != "ar":
            counts = step_counts(config.length, config.steps, "linear").tolist()
            shape = (config.vocabulary, config.length, config.batch, counts, case.refresh_every)
            work = sampling_work(section, *shape)
    backward = isinstance(case, TrainingCase)
    into.flops = None if work is None else flops(work, backward)
    warm = step
    if isinstance(case, SamplingCase):
        warm = _drawing(config, case, model, parts, min(2, config.steps))
    return _Runner(step, warm, work, backward, into)


def _draws(config: BenchmarkConfig) -> partition.StepDraws:
    """Times and groups of the one batch that all training cases step on."""
    shape = (config.batch, config.length)
    return partition.draw(DiffusionConfig(), seed=SEED, step=0, shape=shape, bos=False)


def training_step(
    config: BenchmarkConfig, case: TrainingCase, model: Denoiser, parts: PhaseTimer
) -> Callable[[], dict[str, float]]:
    """A step as the loop takes it, from rows and groups to new weights, without communication."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    draws = _draws(config)
    tokens = np.random.default_rng(SEED).integers(config.vocabulary, size=draws.groups.shape)
    present = np.ones(config.batch, dtype=bool)
    objective = Objective(DiffusionConfig(), False, model.both_groups, model.left_to_right)
    divisor = objective.normaliser(draws.groups)

    def batch() -> Batch:
        return objective.batch(tokens, draws, present, divisor=divisor, device=_CPU)

    def run() -> dict[str, float]:
        model.train()
        parts.start()
        if case.form == "dense":
            assert isinstance(model, PGM)
            loss = dense_loss(model, batch())
        else:
            loss = model(batch())
        loss.sum().backward()
        parts.mark("embedding")
        optimiser.step()
        optimiser.zero_grad()
        return parts.stop("optimiser")

    return run


def _drawing(
    config: BenchmarkConfig, case: SamplingCase, model: Denoiser, parts: PhaseTimer, steps: int
) -> Callable[[], dict[str, float]]:
    """A batch drawn from nothing."""

    def run() -> dict[str, float]:
        model.eval()
        parts.start()
        if case.form == "plain":
            sample_every_position(model, config.batch, steps, SEED)
        elif case.form == "hidden":
            sample_every_hidden(model, config.batch, steps, SEED)
        else:
            sample(model, _request(config, case, steps))
        return parts.stop("draw")

    return run


def _request(config: BenchmarkConfig, case: SamplingCase, steps: int) -> SamplingRequest:
    return SamplingRequest(config.batch, steps, SEED, case.order, refresh_every=case.refresh_every)


def _last_step(config: BenchmarkConfig, case: SamplingCase, model: Denoiser) -> None:
    """The step of a drawing at which most tokens are known, or most is hidden for forms that compute that."""
    model.eval()
    if case.form == "plain":
        sample_every_position(model, config.batch, 1, SEED)
    elif case.form == "hidden":
        sample_every_hidden(model, config.batch, 1, SEED)
    else:
        known = torch.ones(config.batch, config.length, dtype=torch.bool)
        known[:, : -(-config.length // config.steps)] = False
        given = (torch.zeros_like(known, dtype=torch.int64), known)
        sample(model, replace(_request(config, case, 1), known=given))


def peak_memory(config: BenchmarkConfig, case: AnyCase) -> float:
    """Growth of a fresh process by one training step, or by the largest step of a drawing, MiB.

    Weights are there before; gradients and optimiser states count.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_growth, config, case).result()


def _growth(config: BenchmarkConfig, case: AnyCase) -> float:
    torch.set_num_threads(config.threads)
    model = _model(config, case.model)
    before = _kib("VmRSS")
    if isinstance(case, TrainingCase):
        training_step(config, case, model, PhaseTimer(model, clock("wall")))()
    else:
        _last_step(config, case, model)
    return (_kib("VmHWM") - before) / 1024


def _kib(name: str) -> int:
    """A line of this process's status; Linux only, as the rest of the pipeline's CPU path is."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def _trace(runners: list[_Runner], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for runner in runners:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            runner.warm()
        profiler.export_chrome_trace(str(folder / f"{runner.into.label.replace(' ', '_')}.json.gz"))
