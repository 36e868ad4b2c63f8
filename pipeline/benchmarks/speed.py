"""Time training steps and sampling: all cases in turn, with rooflines from the same turns."""

import logging
import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.benchmarks.dense_baseline import dense_loss, sample_every_hidden, sample_every_position
from pipeline.benchmarks.phases import PhaseTimer
from pipeline.benchmarks.roofline import Place, clock, copy_rate, matmul_peak, roofline
from pipeline.config.benchmark import BenchmarkConfig, SamplingCase, TrainingCase
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.partition import draw_order
from pipeline.errors import ConfigError
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import DTYPES, Denoiser
from pipeline.models.flops import Work, flops, sampling_work, training_work
from pipeline.models.pgm import PGM
from pipeline.sampling.orders import step_counts
from pipeline.sampling.sampler import SamplingRequest, sample

log = logging.getLogger(__name__)

SEED = 0
Case = TrainingCase | SamplingCase


@dataclass
class CaseResult:
    """The measurements of one case; lists have an entry per turn.

    Attributes:
        label: name of the case.
        parameters: number of parameters of the model.
        sequences: rows of a step, or of a sampling run.
        tokens: of these rows.
        flops: needed operations; None for the plainer forms, and where the number of tokens per step is random.
        seconds: of a step, or of a sampling run.
        phases: seconds by phase.
        roofline: seconds of its operations, each alone.
        share_of_peak: needed FLOP/s over those of the large matrix product of the same turn.
        peak_mib: growth of the process, or on a GPU of its allocated memory, by one step or run, MiB.
        peak_mib_large: the same with the larger vocabulary.
    """

    label: str
    parameters: int
    sequences: int
    tokens: int
    flops: int | None = None
    seconds: list[float] = field(default_factory=list)
    phases: list[Mapping[str, float]] = field(default_factory=list)
    roofline: list[float] = field(default_factory=list)
    share_of_peak: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    peak_mib_large: float | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def share_of_roofline(self) -> float | None:
        """Median of roofline over time."""
        shares = [r / s for r, s in zip(self.roofline, self.seconds, strict=False)]
        return statistics.median(shares) if shares else None

    @property
    def split(self) -> dict[str, float]:
        """Share of every phase in the time, from medians."""
        names = {name for turn in self.phases for name in turn}
        medians = {n: statistics.median(turn.get(n, 0.0) for turn in self.phases) for n in names}
        return {name: value / sum(medians.values()) for name, value in medians.items()}


@dataclass(frozen=True)
class _Runner:
    """A case that is ready to run.

    Attributes:
        run: gives seconds by phase.
        warm_up: a short form of it.
        work: needed operations of a forward pass or a sampling run, or None.
    """

    run: Callable[[], Mapping[str, float]]
    warm_up: Callable[[], object]
    work: Work | None
    backward: bool
    place: Place
    result: CaseResult

    def take_turn(self, peak: float, now: Callable[[], float]) -> None:
        """Time the case and its roofline once.

        Args:
            peak: FLOP/s of the large matrix product in this turn.
            now: the clock.
        """
        result = self.result
        result.phases.append(self.run())
        result.seconds.append(sum(result.phases[-1].values()))
        if self.work is not None and result.flops is not None:
            result.roofline.append(roofline(self.work, self.backward, now, self.place))
            result.share_of_peak.append(result.flops / result.seconds[-1] / peak)


@dataclass
class Measured:
    """Everything that was timed.

    Attributes:
        results: one per case.
        peaks: FLOP/s of the large matrix product, one per turn.
        copies: bytes/s of the large copy, one per turn.
    """

    results: list[CaseResult] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)


def place_of(config: BenchmarkConfig) -> Place:
    """Find the device to measure.

    Args:
        config: device and precision.

    Raises:
        ConfigError: there is no GPU.
    """
    if config.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "device: 'gpu', but torch finds no CUDA device on this machine; expected a GPU with its driver and a "
            "CUDA build of torch, or device cpu"
        )
    return Place(torch.device("cuda" if config.device == "gpu" else "cpu"), DTYPES[config.precision])


def measure(config: BenchmarkConfig, traces: Path | None = None) -> Measured:
    """Time all cases of a config in turn.

    Args:
        config: the cases and their sizes.
        traces: folder for profiler traces, or None.

    Returns:
        The result of every case, and the rates of the device in every turn.

    Raises:
        ConfigError: there is no GPU.
    """
    torch.set_num_threads(config.threads)
    place = place_of(config)
    now, measured = clock(config.clock, place.device), Measured()
    results = measured.results
    training, sampling = (config.training, config.repetitions), (config.sampling, config.sampling_repetitions)
    for cases, turns in (training, sampling):
        models = {case.model: _build(config, case.model) for case in cases}
        runners = [_runner(config, case, models[case.model], now) for case in cases]
        for runner in runners:
            runner.warm_up()
        for turn in range(turns if cases else 0):
            measured.peaks.append(matmul_peak(now, place))
            measured.copies.append(copy_rate(now, place))
            for runner in runners:
                runner.take_turn(measured.peaks[-1], now)
                seconds = runner.result.seconds[-1]
                log.info("turn %d of %d: %s %.3g s", turn + 1, turns, runner.result.label, seconds)
        results += [runner.result for runner in runners]
        if traces is not None:
            _trace(runners, traces)
    for case, result in zip(config.cases if config.memory else (), results, strict=False):
        result.peak_mib = _peak_memory(config, case)
        log.info("%s: peak %.0f MiB", case.label, result.peak_mib)
        if isinstance(case, TrainingCase):
            large = config.model_copy(update={"vocabulary": config.memory_vocabulary})
            result.peak_mib_large = _peak_memory(large, case)
    return measured


def first_step(config: BenchmarkConfig) -> Callable[[], object]:
    """Build the training step of the first training case."""
    case = config.training[0]
    now = clock(config.clock, place_of(config).device)
    return _training_step(config, case, _build(config, case.model), now)


def _build(config: BenchmarkConfig, name: str) -> Denoiser:
    """Build a model and move every parameter: with gates and heads of zero, results would test nothing."""
    torch.manual_seed(SEED)
    model = build(config.models[name], config.vocabulary, config.length)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    place = place_of(config)
    if config.compile:
        model.compile_blocks()
    return model.to(place.device, place.dtype)


def _runner(config: BenchmarkConfig, case: Case, model: Denoiser, now: Callable[[], float]) -> _Runner:
    """Prepare a case."""
    run: Callable[[], Mapping[str, float]]
    work, section, backward = None, config.models[case.model], isinstance(case, TrainingCase)
    if isinstance(case, TrainingCase):
        run = warm_up = _training_step(config, case, model, now)
        if case.form == "own":
            work = training_work(section, config.vocabulary, _draws(config).groups)
    else:
        sampling, steps = _sampling_run(config, case, model, now), config.steps_of(case)
        run, warm_up = partial(sampling, steps), partial(sampling, 1, _known(config, 1))
        if case.form == "own" and case.order == "uniform" and section.kind != "ar":
            counts = step_counts(config.length, steps, "linear").tolist()
            size = (config.vocabulary, config.length, config.batch)
            work = sampling_work(section, *size, counts, case.refresh_every)
    parameters = sum(p.numel() for p in model.parameters())
    needed = None if work is None else flops(work, backward)
    result = CaseResult(case.label, parameters, config.batch, config.batch * config.length, needed)
    place = place_of(config)
    return _Runner(run, warm_up, work=work, backward=backward, place=place, result=result)


def _draws(config: BenchmarkConfig) -> partition.StepDraws:
    """Draw times and groups of the one batch that all training cases use."""
    shape = (config.batch, config.length)
    return partition.draw(DiffusionConfig(), seed=SEED, step=0, shape=shape, bos=False)


def _training_step(
    config: BenchmarkConfig, case: TrainingCase, model: Denoiser, now: Callable[[], float]
) -> Callable[[], dict[str, float]]:
    """Build a step as the loop takes it, from rows and groups to new weights, without communication."""
    device, on_cpu = model.head.weight.device, config.device == "cpu"
    timer = PhaseTimer(model, now, parts=on_cpu)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    draws = _draws(config)
    tokens = np.random.default_rng(SEED).integers(config.vocabulary, size=draws.groups.shape)
    objective = Objective(
        DiffusionConfig(), bos=False, both_groups=model.both_groups, left_to_right=model.left_to_right
    )
    present, divisor = np.ones(config.batch, dtype=bool), objective.normaliser(draws.groups)
    order = draw_order([SEED, 0, 3], range(config.batch), config.length, bos=False) if model.causal else None
    losses: Callable[[Batch], Tensor] = model
    if case.form == "dense":
        assert isinstance(model, PGM)
        losses = partial(dense_loss, model)

    def run() -> dict[str, float]:
        model.train()
        timer.start()
        batch = objective.batch(tokens, draws, present, divisor=divisor, order=order, device=device)
        losses(batch).sum().backward()
        timer.mark("embedding" if on_cpu else "model")
        optimiser.step()
        optimiser.zero_grad()
        return timer.stop("optimiser")

    return run


def _sampling_run(
    config: BenchmarkConfig, case: SamplingCase, model: Denoiser, now: Callable[[], float]
) -> Callable[..., dict[str, float]]:
    """Build the sampling of a batch of rows, a function of the number of steps and of what is known."""
    on_cpu = config.device == "cpu"
    timer = PhaseTimer(model, now, parts=on_cpu)
    compiles = config.compile and case.form == "own" and config.models[case.model].fixed_steps

    def run(steps: int, known: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
        every = case.refresh_every
        request = SamplingRequest(
            config.batch, steps, SEED, case.order, known=known, refresh_every=every, compile=compiles
        )
        model.eval()
        timer.start()
        if case.form == "own":
            sample(model, request)
        else:
            plainer = sample_every_position if case.form == "plain" else sample_every_hidden
            plainer(model, config.batch, steps, SEED)
        return timer.stop("draw" if on_cpu else "model")

    return run


def _known(config: BenchmarkConfig, unknown: int) -> tuple[Tensor, Tensor]:
    """Give all tokens of every row but the last `unknown` ones: tokens, and where they are given."""
    given = torch.ones(config.batch, config.length, dtype=torch.bool)
    given[:, -unknown:] = False
    return torch.zeros_like(given, dtype=torch.int64), given


def _peak_memory(config: BenchmarkConfig, case: Case) -> float:
    """Measure how much a fresh process grows in one training step, or in sampling up to its largest step, MiB.

    Weights exist before; gradients and optimiser states count. On a GPU it is the memory that this process allocates.
    """
    if config.device == "gpu":
        return _growth(config, case)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_growth, config, case).result()


def _growth(config: BenchmarkConfig, case: Case) -> float:
    """Run what is measured, on a CPU in the fresh process."""
    torch.set_num_threads(config.threads)
    model, on_cpu = _build(config, case.model), config.device == "cpu"
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats()
    before = _status_kib("VmRSS") if on_cpu else torch.cuda.memory_allocated() / 1024
    if isinstance(case, TrainingCase):
        _training_step(config, case, model, clock("wall"))()
    else:
        run, steps = _sampling_run(config, case, model, clock("wall")), config.steps_of(case)
        if model.causal or model.left_to_right:  # these keep what they encode, step by step
            run(steps)
        else:  # the last step, which knows most; the plainer forms ignore what is known
            run(1, _known(config, -(-config.length // steps)))
    peak = _status_kib("VmHWM") if on_cpu else torch.cuda.max_memory_allocated() / 1024
    return (peak - before) / 1024


def _status_kib(name: str) -> int:
    """Read a line of this process's status; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _trace(runners: list[_Runner], folder: Path) -> None:
    """Write a profiler trace of every case."""
    folder.mkdir(parents=True, exist_ok=True)
    for runner in runners:
        with torch.profiler.profile() as profiler:  # of the CPU, and of the GPU where there is one
            runner.warm_up()
        profiler.export_chrome_trace(str(folder / f"{runner.result.label.replace(' ', '_')}.json.gz"))
