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
from torch import Tensor

from pipeline.data.manifest import Manifest
from pipeline.data.mixture import order_of
from pipeline.data.reading_order import MicroBatch, ReadingOrder, batches
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
from pipeline.training.engine import Engine
from pipeline.training.pretraining import Prepared, Pretraining, Task
from pipeline.training.profile import profiled
from pipeline.training.slices import fill
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
    order = order_of(manifest, settings.batch, data, config.seed)
    parts = -(-len(order.slots(rank, session.workers)) // settings.micro_batch)

    # Where to start: rank 0 decides, since ranks may see different states of the storage.
    resume, skipped = resuming.agree(run, rank, session.workers)

    # Model, optimiser, EMA: equal on all ranks.
    torch.manual_seed(config.seed)
    facts = manifest.facts
    model = build(config.model, facts.vocab_size, facts.length, facts.bos, facts.modalities)
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
    stopping = False
    notice: str | None = None
    with ExitStack() as stack:
        tracker = requests = pruner = None
        if rank == 0:
            pruner = stack.enter_context(checkpoint.Pruner(run.folder, settings.keep))
            requests = stack.enter_context(closing(Requests(run.folder)))
            if run.run_id:
                tracker = stack.enter_context(run.tracker(system_metrics=config.tracking.system_metrics))
        traced = stack.enter_context(profiled(run, rank, tracker))
        hang = HangWatch(run.folder, rank, config.cluster.hang_timeout_s)
        stack.callback(hang.end)
        stack.callback(engine.close)
        reader = ShardReader(run.data_path, manifest, "train")
        stack.callback(task.close)

        def prepare(step: int, micros: list[MicroBatch]) -> list[Prepared]:
            return task.prepare(step, micros, skipped.get(step, ()))

        stream = stack.enter_context(
            closing(batches(reader, order, start, rank, session.workers, settings.micro_batch, prepare))
        )

        clock = time.perf_counter()

        def settle(taken: _Taken, running: int | None = None) -> None:
            """Read the figures of a step that was taken, average its weights, and log it.

            The next update must not have begun. Logging is not part of the time of the step that is `running`.
            """
            nonlocal losses, seconds, waited, clock, metrics, stopping, notice
            loss, stop, saving, check_notice, norm = taken.figures()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                _report_nonfinite(run, session, order, taken, skipped)
                raise _NonfiniteStep
            ema.update(masters)
            traced()
            hang.end()
            losses.append(loss)
            now = time.perf_counter()
            seconds, times["training"], clock = seconds + now - clock, times["training"] + now - clock, now
            done = taken.step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                metrics = {
                    "train/loss": float(np.mean(losses)),
                    **throughput.metrics(len(losses), seconds),
                    "train/data_wait": waited / seconds,
                    "train/learning_rate": engine.rate(taken.step),
                    "train/gradient_norm": norm,
                    "train/epoch": order.epoch_of(taken.step),
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
            stopping = stopping or bool(stop)
            notice = (session.notice() if check_notice else None) or notice
            if saving and not notice:
                notice = "the group of workers is about to change"
            if running is not None:
                hang.begin(running)

        times["set-up"] = time.perf_counter() - began_attempt
        clock = time.perf_counter()
        taken: _Taken | None = None  # the last step, while its figures are not read
        for step in range(start, settings.steps):
            if step > start:  # the first one compiles kernels
                hang.begin(step)
            began = time.perf_counter()
            micros = next(stream)
            waited += time.perf_counter() - began
            if taken and task.reads_weights(step):
                settle(taken, running=step)
                taken = None

            # Gradients of the global batch.
            task.start(step)
            part_losses = []
            for part, micro in enumerate(micros):
                if part > 0:
                    engine.step(step)  # not the last micro-batch: only moves the accumulation on
                # Seeds dropout; + 1, because the index of a missing row is -1.
                torch.manual_seed(mix_seed(config.seed + 1, step + 1, int(micro.index[0]) + 1) >> 1)
                part_losses.append(engine.backward(task.batch(micro)))
            row_losses = torch.cat(part_losses)  # [slots]
            flags = requests.take() if requests else (False, False, False)
            shared = torch.cat([row_losses.sum()[None], row_losses.new_tensor(flags)])
            dist.all_reduce(shared)

            # The update. Its figures are read while the device computes the next gradients.
            if taken:
                settle(taken, running=step)
            engine.step(step)
            places = np.concatenate([micro.index for micro in micros])
            taken = _Taken(step, places, row_losses, torch.cat([shared, engine.gradient_norm()[None]]))
            done = step + 1
            last = done == settings.steps
            validating = done % settings.validate_every == 0 or last
            saving = done % settings.checkpoint_every == 0 or last
            if validating or saving or stopping or notice:  # only of a step that was finite
                settle(taken)
                taken = None
            hang.end()
            if notice and rank == 0:
                log.warning("step %d: %s; saving before that", done, notice)
            validation: float | None = None
            samples: tuple[str, ...] = ()
            if validating:
                with _timed(times, "validation"):
                    validation, samples = validate(run, engine, ema, session, tracker, done)
                metrics[f"validation/{config.validation_metric}"] = validation

            if saving or stopping or notice:
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
                    files = checkpoint.save(local, engine, ema, state, rank)
                    if pruner:
                        pruner.prune_in_thread(state, files)
                    session.publish(local, name, metrics)
                notice = None
            if stopping:
                log.info("stopped at step %d on request", done)
                break
            if taken is None:
                clock = time.perf_counter()
        with _timed(times, "checkpoints"):  # wait for uploads
            session.settle()
        if rank == 0:
            log.info("the loop took %s", ", ".join(f"{value:.1f} s {part}" for part, value in times.items()))
    return metrics


class _Taken:
    """A step whose update has been requested, while its figures are on their way to the host.

    Args:
        step: counted from 0.
        places: of the rows in the global batch.
        row_losses: of these rows.
        figures: what `figures` returns, on the device.
    """

    def __init__(self, step: int, places: np.ndarray, row_losses: Tensor, figures: Tensor):
        self.step, self._places, self._row_losses = step, places, row_losses
        self._copied: torch.cuda.Event | None = None
        if figures.is_cuda:
            self._figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._figures = figures

    def figures(self) -> list[float]:
        """Wait for the figures: the loss, the requests of `Requests.take`, and the norm of the gradient."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._figures.tolist()

    def not_finite(self) -> list[int]:
        """Return the places of the rows whose loss is not finite."""
        bad = (~torch.isfinite(self._row_losses)).cpu().numpy() & (self._places >= 0)
        return self._places[bad].tolist()


@contextmanager
def _timed(times: dict[str, float], part: str) -> Iterator[None]:
    """Add the time of the block to a part of the loop's time."""
    began = time.perf_counter()
    yield
    times[part] += time.perf_counter() - began


def _report_nonfinite(
    run: Run, session: Session, order: ReadingOrder, taken: _Taken, skipped: resuming.Skipped
) -> None:
    """Log and record the rows that made a step not finite, so that the next attempt skips them.

    Raises:
        TrainingError: `train.on_nonfinite` is stop, or the rows are not the cause.
    """
    step = taken.step
    gathered: list[Any] = [None] * session.workers
    dist.all_gather_object(gathered, taken.not_finite())
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
