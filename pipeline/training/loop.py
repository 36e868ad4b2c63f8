"""One worker's training, from top to bottom."""

import gc
import logging
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare.prepare import data_path
from pipeline.data.reading_order import ReadingOrder, batches
from pipeline.data.shards import ShardReader
from pipeline.errors import TrainingError
from pipeline.models import build
from pipeline.runtime.control_files import Requests
from pipeline.runtime.session import HangWatch, Session
from pipeline.seeds import mix_seed
from pipeline.tracking import Tracker
from pipeline.training import checkpoint
from pipeline.training import resume as resuming
from pipeline.training.distillation import Distillation
from pipeline.training.ema import EMA
from pipeline.training.engine import Engine
from pipeline.training.pretraining import Pretraining, Task
from pipeline.training.validation import Validation, validate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker."""

    config: RunConfig
    tracking_uri: str | None = None  # None: no tracking
    run_id: str | None = None


class _GoBack(Exception):
    """A step was not finite: start again from the last checkpoint, without the rows in `skipped.json`."""


def train(job: Job, session: Session) -> dict[str, float]:
    """Train to `train.steps`, from the newest usable checkpoint of the run if there is one.

    Everything random is a function of (seed, step, index in the global batch), and the data's position of the
    step, so a resumed run repeats exactly what an undisturbed one does.

    Returns:
        the last logged metrics.

    Raises:
        CheckpointError: the run's checkpoints do not fit this config or number of workers.
        TrainingError: a loss or gradient is not finite, and the config says stop, or skipping cannot help.
    """
    while True:
        try:
            return _attempt(job, session)
        except _GoBack:
            pass  # its traceback holds the model that failed
        session.settle()
        gc.collect()  # DeepSpeed's engine holds itself, and two may not fit
        torch.cuda.empty_cache()


def _attempt(job: Job, session: Session) -> dict[str, float]:
    config, rank, device = job.config, session.rank, session.device
    spent = _Spent()
    run = checkpoint.run_folder(config)

    # Data: which rows each step reads, and which of them are ours.
    path = data_path(config)
    manifest = Manifest.read(path)
    reader = ShardReader(path, manifest, "train")
    order = ReadingOrder(
        manifest.rows_per_shard("train"),
        config.train.batch,
        config.data.streams,
        config.data.shuffle_window,
        config.seed,
    )
    parts = -(-len(order.slots(rank, session.workers)) // config.train.micro_batch)

    # Where to start: rank 0 decides, so that no two ranks see different folders.
    plan: list[Any] = [resuming.plan_resume(run, config, session.workers) if rank == 0 else None]
    skipped: list[Any] = [resuming.read_skipped(run) if rank == 0 else None]
    dist.broadcast_object_list(plan)
    dist.broadcast_object_list(skipped)
    resume: resuming.Resume | None = plan[0]

    # Model, optimiser, EMA: equal on all ranks.
    torch.manual_seed(config.seed)
    model = build(config.model, manifest.vocabulary, manifest.length, manifest.special.bos)
    initial = None if resume else resuming.initial_weights(config, model)
    engine = Engine(
        model, config.optim, config.train, parts, device, universal=bool(resume and resume.universal)
    )
    ema = EMA(engine.masters(), config.train.ema)
    if resume:
        resume.load(engine, ema)
    elif initial:
        initial.load(engine, ema)
    start = resume.state.step if resume else 0
    masters = engine.masters()
    task: Task = Pretraining(config, manifest, model, device)
    if config.distill:
        task = Distillation(config, manifest, engine, ema, session)
    if rank == 0:
        log.info(
            "%s from step %d: %d workers x %d micro-batches of up to %d rows, %d streams, ZeRO stage %d, %s",
            "resuming" if resume else "starting",
            start,
            session.workers,
            parts,
            config.train.micro_batch,
            config.data.streams,
            config.train.zero_stage,
            config.train.precision,
        )

    hang = HangWatch(run, rank, config.cluster.hang_timeout_s)
    tracker = requests = None
    if rank == 0:
        requests = Requests(run)
        if job.tracking_uri and job.run_id:
            tracker = Tracker(
                job.tracking_uri, job.run_id, tracking_spill(config), config.tracking.system_metrics
            )
    metrics: dict[str, float] = {}
    spent.until_now("set-up")
    interval = _Interval()
    stream = batches(reader, order, start, rank, session.workers, config.train.micro_batch)
    try:
        for step in range(start, config.train.steps):
            if step > start:  # the first one compiles kernels
                hang.begin(step)
            began = time.perf_counter()
            micros = next(stream)
            interval.waited += time.perf_counter() - began

            # Gradients of the global batch.
            task.start(step)
            places = np.concatenate([micro.index for micro in micros])
            losses = []
            for part, micro in enumerate(micros):
                if part > 0:
                    engine.step(step)  # not the last micro-batch: only moves the accumulation on
                # Seeds dropout; + 1, because the index of a missing row is -1.
                torch.manual_seed(mix_seed(config.seed + 1, step + 1, int(micro.index[0]) + 1) >> 1)
                present = (micro.index >= 0) & ~np.isin(micro.index, skipped[0].get(step, ()))
                losses.append(engine.backward(task.batch(micro, present)))
            row_losses = torch.cat(losses)  # [slots], of `places`
            asked = requests.take() if requests else (False, False, False)
            shared = torch.cat([row_losses.sum()[None], row_losses.new_tensor(asked)])
            dist.all_reduce(shared)
            loss, stopping, saving, looking = shared.tolist()
            done = step + 1

            # The update, unless something is not finite.
            finite = math.isfinite(loss)
            if finite:
                engine.step(step)
                norm = engine.gradient_norm()
                finite = math.isfinite(norm)
            if not finite:
                bad = places[(~torch.isfinite(row_losses)).cpu().numpy() & (places >= 0)]
                _report_nonfinite(config, session, order, step, bad, skipped[0])
                raise _GoBack
            ema.update(masters)
            seconds = time.perf_counter() - began
            interval.add(loss, seconds)
            spent.seconds["training"] += seconds
            hang.end()

            if done % config.train.log_every == 0 or done == config.train.steps:
                metrics = interval.metrics(config.train.batch * manifest.length) | {
                    "train/learning_rate": engine.rate(step),
                    "train/gradient_norm": norm,
                    "train/epoch": order.epoch_of(step),
                    "train/memory_gib": _memory(device),
                }
                session.log(metrics, done)
                if rank == 0:
                    log.info("%s", _line(done, config.train.steps, metrics, interval.seconds_a_step()))
                if tracker:
                    tracker.log_metrics(metrics, done)
                interval = _Interval()

            notice = session.notice() if looking else None
            if saving and not notice:
                notice = "the group of workers is about to change"
            if notice and rank == 0:
                log.warning("step %d: %s; saving before that", done, notice)
            last = stopping or done == config.train.steps
            judged: Validation | None = None
            if done % config.train.validate_every == 0 or done == config.train.steps:
                with spent.on("validation"):
                    judged = validate(config, manifest, engine, ema, session, tracker, done)
                metrics[f"validation/{judged.metric}"] = judged.value

            if done % config.train.checkpoint_every == 0 or last or notice:
                if rank == 0:
                    checkpoint.prune(run, config.train.keep)
                local = Path(tempfile.mkdtemp(prefix=f"{checkpoint.name_of(done)}-"))
                state = checkpoint.TrainState(
                    step=done,
                    epoch=order.epoch_of(step),
                    workers=session.workers,
                    config=config.model_dump(mode="json"),
                    run_id=job.run_id,
                    validation=judged.value if judged else None,
                    samples=judged.texts if judged else (),
                    task=task.facts(),
                )
                with spent.on("checkpoints"):
                    checkpoint.save(local, engine, ema, state, rank)
                    session.publish(local, checkpoint.name_of(done), metrics)
            if stopping:
                log.info("stopped at step %d, as asked", done)
                break
        with spent.on("checkpoints"):  # uploads that still run
            session.settle()
        if rank == 0:
            log.info("the loop took %s", spent)
    finally:
        stream.close()
        engine.close()
        hang.close()
        if requests:
            requests.close()
        if tracker:
            tracker.close()
    return metrics


def tracking_spill(config: RunConfig) -> Path:
    """Where metrics wait that MLflow did not take: the run's folder if it is local, else this node's."""
    run = checkpoint.run_folder(config)
    base = Path(run) if storage.is_local(run) else Path(tempfile.gettempdir()) / config.name
    base.mkdir(parents=True, exist_ok=True)
    return base / "untracked.jsonl"


def _report_nonfinite(
    config: RunConfig,
    session: Session,
    order: ReadingOrder,
    step: int,
    bad: np.ndarray,
    skipped: resuming.Skipped,
) -> None:
    """Log and save which rows made a step not finite, so that the next attempt leaves them out.

    Raises:
        TrainingError: the config says stop, or the rows are not to blame.
    """
    gathered: list[Any] = [None] * session.workers
    dist.all_gather_object(gathered, bad.tolist())
    # Finite losses with a gradient that is not: no row can be singled out, so the step goes without all.
    blamed = sorted(place for one in gathered for place in one)
    places = blamed or list(range(config.train.batch))
    rows = order.rows_of_step(step)[places].tolist()
    what = f"step {step + 1}: loss or gradient is not finite; rows of the data: {rows[:16]}"
    what += f" and {len(rows) - 16} more" if len(rows) > 16 else ""
    if len(blamed) == config.train.batch:
        raise TrainingError(f"{what}: every row of the batch, so the weights are; lower optim.lr?")
    if step in skipped:
        raise TrainingError(f"{what}, although rows were skipped in this step already; lower optim.lr?")
    if session.rank == 0:
        resuming.add_skipped(checkpoint.run_folder(config), step, places, rows)
    dist.barrier()
    if config.train.on_nonfinite == "stop":
        raise TrainingError(f"{what} (train.on_nonfinite: stop); started again, the run goes on without them")
    if session.rank == 0:
        log.warning("%s; going back to the last checkpoint and skipping them", what)


class _Spent:
    """Seconds of one attempt by what they went to."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __str__(self) -> str:
        return ", ".join(f"{seconds:.1f} s {part}" for part, seconds in self.seconds.items())

    def until_now(self, part: str) -> None:
        """All since the start was this part's."""
        self.seconds[part] += time.perf_counter() - self._began

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """What happens inside is this part's."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


class _Interval:
    """What is gathered between two log lines."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds = 0.0
        self.waited = 0.0

    def add(self, loss: float, seconds: float) -> None:
        self.losses.append(loss)
        self.seconds += seconds

    def seconds_a_step(self) -> float:
        return self.seconds / len(self.losses)

    def metrics(self, tokens: int) -> dict[str, float]:
        """Mean loss, throughput for steps of `tokens` tokens, share of the time spent waiting for data."""
        return {
            "train/loss": float(np.mean(self.losses)),
            "train/tokens_per_second": tokens / self.seconds_a_step(),
            "train/data_wait": self.waited / self.seconds,
        }


def _memory(device: torch.device) -> float:
    """GiB: peak of the device's allocator, or the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _line(done: int, steps: int, metrics: dict[str, float], seconds_a_step: float) -> str:
    minutes, seconds = divmod(round((steps - done) * seconds_a_step), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"step {done}/{steps}  loss {metrics['train/loss']:.3f}  "
        f"{metrics['train/tokens_per_second']:,.0f} tokens/s  data wait {metrics['train/data_wait']:.1%}  "
        f"left {hours}:{minutes:02d}:{seconds:02d}"
    )
