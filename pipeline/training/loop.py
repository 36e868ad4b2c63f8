"""The training loop of one worker."""

import gc
import logging
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from pipeline.data.manifest import Manifest
from pipeline.data.reading_order import ReadingOrder, batches
from pipeline.data.shards import ShardReader
from pipeline.errors import TrainingError
from pipeline.models import build
from pipeline.run import Run
from pipeline.runtime.control_files import Requests
from pipeline.runtime.session import HangWatch, Session
from pipeline.training import checkpoint
from pipeline.training import resume as resuming
from pipeline.training.distillation import Distillation
from pipeline.training.ema import EMA
from pipeline.training.engine import Engine
from pipeline.training.pretraining import Pretraining, Task
from pipeline.training.validation import Validation, validate

log = logging.getLogger(__name__)


class _NonfiniteStep(Exception):
    """A step was not finite: resume from the last checkpoint, without the rows in `skipped.json`."""


def train(run: Run, session: Session) -> dict[str, float]:
    """Train until `train.steps`, from the newest usable checkpoint of the run if there is one.

    All randomness is a function of (seed, step, index in the global batch), and the position in the data is one
    of the step. So a resumed run repeats exactly what an undisturbed run does.

    Args:
        run: with data; its manifest is read here.
        session: this worker's place in its group.

    Returns:
        The last logged metrics.

    Raises:
        CheckpointError: the run's checkpoints do not fit this config or number of workers.
        TrainingError: a loss or gradient is not finite, and `train.on_nonfinite` is stop, or skipping rows
            cannot help.
    """
    while True:
        try:
            return _attempt(run, session)
        except _NonfiniteStep:
            pass  # leaving the block frees the traceback, which holds the model
        session.settle()
        gc.collect()  # DeepSpeed's engine is a reference cycle, and two may not fit into memory
        torch.cuda.empty_cache()


def _attempt(run: Run, session: Session) -> dict[str, float]:
    config, rank, device = run.config, session.rank, session.device
    times = _TimeByPart()

    # Data: the rows of each step, and those of this worker.
    run = run.replace(given_manifest=Manifest.read(run.data_path))
    manifest = run.manifest
    reader = ShardReader(run.data_path, manifest, "train")
    order = ReadingOrder(
        manifest.rows_per_shard("train"),
        config.train.batch,
        config.data.streams,
        config.data.shuffle_window,
        config.seed,
    )
    parts = -(-len(order.slots(rank, session.workers)) // config.train.micro_batch)

    # Where to start: rank 0 decides, since ranks may see different states of the storage.
    plan: list[Any] = [resuming.plan_resume(run, session.workers) if rank == 0 else None]
    skipped: list[Any] = [resuming.read_skipped(run.folder) if rank == 0 else None]
    dist.broadcast_object_list(plan)
    dist.broadcast_object_list(skipped)
    resume: resuming.Resume | None = plan[0]

    # Model, optimiser, EMA: equal on all ranks.
    torch.manual_seed(config.seed)
    model = build(config.model, manifest.vocabulary, manifest.length, manifest.special.bos)
    initial = None if resume else resuming.initial_weights(run, model)
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
    task: Task = Pretraining(run, model, device)
    if config.distill:
        task = Distillation(run, engine, ema, session)
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

    hang = HangWatch(run.folder, rank, config.cluster.hang_timeout_s)
    tracker = requests = None
    if rank == 0:
        requests = Requests(run.folder)
        if run.run_id:
            tracker = run.tracker(config.tracking.system_metrics)
    metrics: dict[str, float] = {}
    times.until_now("set-up")
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
                torch.manual_seed(_mix(config.seed, step, int(micro.index[0])))  # dropout
                present = (micro.index >= 0) & ~np.isin(micro.index, skipped[0].get(step, ()))
                losses.append(engine.backward(task.batch(micro, present)))
            row_losses = torch.cat(losses)  # [slots], of `places`
            flags = requests.take() if requests else (False, False, False)
            shared = torch.cat([row_losses.sum()[None], row_losses.new_tensor(flags)])
            dist.all_reduce(shared)
            loss, stopping, saving, check_notice = shared.tolist()
            done = step + 1

            # The update, unless something is not finite.
            finite = math.isfinite(loss)
            if finite:
                engine.step(step)
                norm = engine.gradient_norm()
                finite = math.isfinite(norm)
            if not finite:
                bad = places[(~torch.isfinite(row_losses)).cpu().numpy() & (places >= 0)]
                _report_nonfinite(run, session, order, step, bad, skipped[0])
                raise _NonfiniteStep
            ema.update(masters)
            seconds = time.perf_counter() - began
            interval.add(loss, seconds)
            times.seconds["training"] += seconds
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

            notice = session.notice() if check_notice else None
            if saving and not notice:
                notice = "the group of workers is about to change"
            if notice and rank == 0:
                log.warning("step %d: %s; saving before that", done, notice)
            last = stopping or done == config.train.steps
            validation: Validation | None = None
            if done % config.train.validate_every == 0 or done == config.train.steps:
                with times.on("validation"):
                    validation = validate(run, engine, ema, session, tracker, done)
                metrics[f"validation/{validation.metric}"] = validation.value

            if done % config.train.checkpoint_every == 0 or last or notice:
                if rank == 0:
                    checkpoint.prune(run.folder, config.train.keep)
                local = Path(tempfile.mkdtemp(prefix=f"{checkpoint.name_of(done)}-"))
                state = checkpoint.TrainState(
                    step=done,
                    epoch=order.epoch_of(step),
                    workers=session.workers,
                    config=config.model_dump(mode="json"),
                    run_id=run.run_id,
                    validation=validation.value if validation else None,
                    samples=validation.texts if validation else (),
                    task=task.facts(),
                )
                with times.on("checkpoints"):
                    checkpoint.save(local, engine, ema, state, rank)
                    session.publish(local, checkpoint.name_of(done), metrics)
            if stopping:
                log.info("stopped at step %d, as asked", done)
                break
        with times.on("checkpoints"):  # wait for uploads
            session.settle()
        if rank == 0:
            log.info("the loop took %s", times)
    finally:
        stream.close()
        engine.close()
        hang.close()
        if requests:
            requests.close()
        if tracker:
            tracker.close()
    return metrics


def _report_nonfinite(
    run: Run,
    session: Session,
    order: ReadingOrder,
    step: int,
    bad: np.ndarray,
    skipped: resuming.Skipped,
) -> None:
    """Log and record the rows that made a step not finite, so that the next attempt skips them.

    Raises:
        TrainingError: `train.on_nonfinite` is stop, or the rows are not the cause.
    """
    gathered: list[Any] = [None] * session.workers
    dist.all_gather_object(gathered, bad.tolist())
    # If all losses are finite and the gradient is not, no row can be singled out, and all rows are skipped.
    blamed = sorted(place for of_rank in gathered for place in of_rank)
    places = blamed or list(range(run.config.train.batch))
    rows = order.rows_of_step(step)[places].tolist()
    message = f"step {step + 1}: loss or gradient is not finite; rows of the data: {rows[:16]}"
    message += f" and {len(rows) - 16} more" if len(rows) > 16 else ""
    if len(blamed) == run.config.train.batch:
        raise TrainingError(
            f"{message}: every row of the batch, so the weights are not finite; lower optim.lr"
        )
    if step in skipped:
        raise TrainingError(f"{message}, although rows were skipped in this step already; lower optim.lr")
    if session.rank == 0:
        resuming.add_skipped(run.folder, step, places, rows)
    dist.barrier()
    if run.config.train.on_nonfinite == "stop":
        raise TrainingError(
            f"{message} (train.on_nonfinite: stop); the same command continues the run without them"
        )
    if session.rank == 0:
        log.warning("%s; going back to the last checkpoint and skipping them", message)


class _TimeByPart:
    """Seconds of one attempt, by part of the work."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __str__(self) -> str:
        return ", ".join(f"{seconds:.1f} s {part}" for part, seconds in self.seconds.items())

    def until_now(self, part: str) -> None:
        """Add the time since the start to a part."""
        self.seconds[part] += time.perf_counter() - self._began

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


class _Interval:
    """Losses and times between two log lines."""

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
        """Compute mean loss, tokens/s for steps of `tokens` tokens, and the share of time spent on data."""
        return {
            "train/loss": float(np.mean(self.losses)),
            "train/tokens_per_second": tokens / self.seconds_a_step(),
            "train/data_wait": self.waited / self.seconds,
        }


def _mix(*numbers: int) -> int:
    """Mix several numbers into a seed of a generator."""
    return int(np.random.SeedSequence([n + 1 for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


def _memory(device: torch.device) -> float:
    """Return the peak of the device's allocator, or the resident size of the process, in GiB."""
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
