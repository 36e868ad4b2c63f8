"""The training loop of one worker."""

import gc
import logging
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
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
from pipeline.seeds import mix_seed
from pipeline.training import checkpoint
from pipeline.training import resume as resuming
from pipeline.training.distillation import Distillation
from pipeline.training.ema import EMA
from pipeline.training.engine import Engine, fill
from pipeline.training.pretraining import Pretraining, Task
from pipeline.training.throughput import Throughput
from pipeline.training.validation import validate

log = logging.getLogger(__name__)

_LIMIT = 3  # steps in a row whose rows may all be skipped because of the gradient


class _NonfiniteStep(Exception):
    """A step was not finite: resume from the last checkpoint, without the rows in `skipped.json`."""


def train(run: Run, session: Session) -> dict[str, float]:
    """Train until `train.steps`, from the newest usable checkpoint of the run if there is one.

    All randomness is a function of (seed, step, index in the global batch), and the position in the data is a
    function of the step. So a resumed run computes exactly what an uninterrupted run does.

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
    """Train until the last step, or until a step is not finite."""
    config, settings, data = run.config, run.config.train, run.config.data
    rank, device = session.rank, session.device
    began_attempt = time.perf_counter()
    times: dict[str, float] = defaultdict(float)  # seconds by part of the work

    # Data: the rows of each step, and those of this worker.
    run = run.replace(given_manifest=Manifest.read(run.data_path))
    manifest = run.manifest
    order = ReadingOrder(
        manifest.rows_per_shard("train"), settings.batch, data.streams, data.shuffle_window, config.seed
    )
    parts = -(-len(order.slots(rank, session.workers)) // settings.micro_batch)

    # Where to start: rank 0 decides, since ranks may see different states of the storage.
    start_state: list[Any] = [None, None]
    if rank == 0:
        start_state = [resuming.plan_resume(run, session.workers), resuming.read_skipped(run.folder)]
    dist.broadcast_object_list(start_state)
    resume: resuming.Resume | None = start_state[0]
    skipped: resuming.Skipped = start_state[1]

    # Model, optimiser, EMA: equal on all ranks.
    torch.manual_seed(config.seed)
    model = build(config.model, manifest.vocabulary, manifest.length, manifest.special.bos)
    initial, base = None, None
    if config.model.lora is not None:
        base = resuming.adapt_base(run, model, config.model.lora, resume)
    elif resume is None:
        initial = resuming.initial_weights(run, model)
    engine = Engine(model, config, parts, device, universal=resume is not None and resume.universal)
    ema = EMA(engine.masters(), settings.ema)
    if resume:
        resume.load(engine, ema, rank)
    elif initial:
        weights, average = initial
        fill(engine.masters(), weights)
        fill(ema.slices, average)
    start = resume.state.step if resume else 0
    throughput = Throughput(run, session.workers, device)
    masters = engine.masters()
    task: Task = (
        Distillation(run, engine, ema, session) if config.distill else Pretraining(run, model, device)
    )
    if rank == 0:
        log.info(
            f"{'resuming' if resume else 'starting'} from step {start}: {session.workers} workers x {parts} "
            f"micro-batches of up to {settings.micro_batch} rows, {data.streams} streams, "
            f"ZeRO stage {settings.zero_stage}, {settings.precision}"
        )

    metrics: dict[str, float] = {}
    # Since the last log line: losses, seconds of training, and seconds of these that waited for data.
    losses: list[float] = []
    seconds, waited = 0.0, 0.0
    with ExitStack() as stack:
        tracker = requests = None
        if rank == 0:
            requests = stack.enter_context(closing(Requests(run.folder)))
            if run.run_id:
                tracker = stack.enter_context(run.tracker(system_metrics=config.tracking.system_metrics))
        hang = HangWatch(run.folder, rank, config.cluster.hang_timeout_s)
        stack.callback(hang.end)
        stack.callback(engine.close)
        reader = ShardReader(run.data_path, manifest, "train")
        stream = stack.enter_context(
            closing(batches(reader, order, start, rank, session.workers, settings.micro_batch))
        )
        times["set-up"] = time.perf_counter() - began_attempt
        for step in range(start, settings.steps):
            if step > start:  # the first one compiles kernels
                hang.begin(step)
            began = time.perf_counter()
            micros = next(stream)
            waited += time.perf_counter() - began

            # Gradients of the global batch.
            task.start(step, micros)
            places = np.concatenate([micro.index for micro in micros])
            part_losses = []
            for part, micro in enumerate(micros):
                if part > 0:
                    engine.step(step)  # not the last micro-batch: only moves the accumulation on
                # Seeds dropout; + 1, because the index of a missing row is -1.
                torch.manual_seed(mix_seed(config.seed + 1, step + 1, int(micro.index[0]) + 1) >> 1)
                present = (micro.index >= 0) & ~np.isin(micro.index, skipped.get(step, ()))
                part_losses.append(engine.backward(task.batch(micro, present)))
            row_losses = torch.cat(part_losses)  # [slots], of `places`
            flags = requests.take() if requests else (False, False, False)
            shared = torch.cat([row_losses.sum()[None], row_losses.new_tensor(flags)])
            dist.all_reduce(shared)
            loss, stopping, saving, check_notice = shared.tolist()
            done = step + 1
            last = done == settings.steps

            # The update, unless something is not finite.
            finite = math.isfinite(loss)
            if finite:
                engine.step(step)
                norm = engine.gradient_norm()
                finite = math.isfinite(norm)
            if not finite:
                bad = places[(~torch.isfinite(row_losses)).cpu().numpy() & (places >= 0)]
                _report_nonfinite(run, session, order, step, bad, skipped)
                raise _NonfiniteStep
            ema.update(masters)
            losses.append(loss)
            step_seconds = time.perf_counter() - began
            seconds += step_seconds
            times["training"] += step_seconds
            hang.end()

            if done % settings.log_every == 0 or last:
                metrics = {
                    "train/loss": float(np.mean(losses)),
                    **throughput.metrics(len(losses), seconds),
                    "train/data_wait": waited / seconds,
                    "train/learning_rate": engine.rate(step),
                    "train/gradient_norm": norm,
                    "train/epoch": order.epoch_of(step),
                    "train/memory_gib": _memory(device),
                }
                session.log(metrics, done)
                if rank == 0:
                    left = timedelta(seconds=round((settings.steps - done) * seconds / len(losses)))
                    log.info(
                        f"step {done}/{settings.steps}  loss {metrics['train/loss']:.3f}  "
                        f"{metrics['train/tokens_per_second']:,.0f} tokens/s  "
                        f"data wait {metrics['train/data_wait']:.1%}  left {left}"
                    )
                if tracker:
                    tracker.log_metrics(metrics, done)
                losses, seconds, waited = [], 0.0, 0.0

            notice = session.notice() if check_notice else None
            if saving and not notice:
                notice = "the group of workers is about to change"
            if notice and rank == 0:
                log.warning("step %d: %s; saving before that", done, notice)
            validation: float | None = None
            samples: tuple[str, ...] = ()
            if done % settings.validate_every == 0 or last:
                with _timed(times, "validation"):
                    validation, samples = validate(run, engine, ema, session, tracker, done)
                metrics[f"validation/{config.validation_metric}"] = validation

            if done % settings.checkpoint_every == 0 or last or stopping or notice:
                if rank == 0:
                    checkpoint.prune(run.folder, settings.keep)
                name = checkpoint.name_of(done)
                local = Path(tempfile.mkdtemp(prefix=f"{name}-"))
                state = checkpoint.TrainState(
                    step=done,
                    epoch=order.epoch_of(step),
                    workers=session.workers,
                    config=config.model_dump(mode="json"),
                    run_id=run.run_id,
                    validation=validation,
                    samples=samples,
                    task=task.facts() | ({} if base is None else {"base": base}),
                )
                with _timed(times, "checkpoints"):
                    checkpoint.save(local, engine, ema, state, rank)
                    session.publish(local, name, metrics)
            if stopping:
                log.info("stopped at step %d on request", done)
                break
        with _timed(times, "checkpoints"):  # wait for uploads
            session.settle()
        if rank == 0:
            log.info("the loop took %s", ", ".join(f"{value:.1f} s {part}" for part, value in times.items()))
    return metrics


@contextmanager
def _timed(times: dict[str, float], part: str) -> Iterator[None]:
    """Add the time of the block to a part of the loop's time."""
    began = time.perf_counter()
    yield
    times[part] += time.perf_counter() - began


def _report_nonfinite(
    run: Run, session: Session, order: ReadingOrder, step: int, bad: np.ndarray, skipped: resuming.Skipped
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
    more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
    message = f"step {step + 1}: loss or gradient is not finite; rows of the data: {rows[:16]}{more}"
    if len(blamed) == run.config.train.batch:
        raise TrainingError(
            f"{message}: every row of the batch, so the weights are not finite; lower optim.lr"
        )
    streak = min(_LIMIT, run.config.train.steps)
    before = [skipped.get(earlier, ()) for earlier in range(step - streak + 1, step)]
    if not blamed and all(len(rows_before) == run.config.train.batch for rows_before in before):
        raise TrainingError(
            f"{message}: the gradient of {streak} steps in a row is not finite while all losses are, so rows are not "
            "the cause; lower optim.lr, or set train.precision=fp32"
        )
    if step in skipped:
        raise TrainingError(f"{message}, although rows were skipped in this step already; lower optim.lr")
    if session.rank == 0:
        resuming.add_skipped(run.folder, step, places, rows)
    dist.barrier()
    if run.config.train.on_nonfinite == "stop":
        reason = "(train.on_nonfinite: stop); the same command continues the run without them"
        raise TrainingError(f"{message} {reason}")
    if session.rank == 0:
        log.warning("%s; going back to the last checkpoint and skipping them", message)


def _memory(device: torch.device) -> float:
    """Return the peak of the device's allocator, or the resident size of the process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
