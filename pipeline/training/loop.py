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
            with ExitStack() as stack:
                return _Attempt(run, session, stack).train()
        except _NonfiniteStep:
            pass  # leaving the block frees the traceback, which holds the model
        session.settle()
        gc.collect()  # DeepSpeed's engine is a reference cycle, and two may not fit into memory
        torch.cuda.empty_cache()


class _Attempt:
    """Training from the newest checkpoint until the last step, or until a step is not finite.

    Args:
        run: with data; its manifest is read here.
        session: this worker's place in its group.
        stack: closes what is opened here.
    """

    def __init__(self, run: Run, session: Session, stack: ExitStack):
        self._times: dict[str, float] = defaultdict(float)  # seconds by part of the work
        with _timed(self._times, "set-up"):
            self._run = run = run.replace(given_manifest=Manifest.read(run.data_path))
            self._session = session
            self._order = order_of(run.manifest, run.config.train.batch, run.config.data, run.config.seed)
            # Where to start: rank 0 decides, since ranks may see different states of the storage.
            resume, self._skipped = resuming.agree(run, session.rank, session.workers)
            self._build(resume)
            self._open(stack)
        self._metrics: dict[str, float] = {}  # of the last log line
        # Since the last log line: losses, seconds of training, and seconds of these that waited for data.
        self._losses: list[float] = []
        self._seconds = self._waited = 0.0
        self._clock = time.perf_counter()
        self._taken: _Taken | None = None  # the last step, while its figures are not read
        self._stopping = False
        self._notice: str | None = None  # why a checkpoint is to be saved now

    def _build(self, resume: resuming.Resume | None) -> None:
        """Make model, optimiser and EMA, equal on all ranks, and the task."""
        run, session, config, settings = self._run, self._session, self._run.config, self._run.config.train
        slots = len(self._order.slots(session.rank, session.workers))
        # Micro-batches by tokens differ in number between steps: the task cuts the rows, and any number but 1 does.
        self._micro_batch = settings.micro_batch or slots
        parts = -(-slots // self._micro_batch) if settings.micro_tokens is None else 2

        torch.manual_seed(config.seed)
        facts = run.manifest.facts
        model = build(config.model, facts.vocab_size, facts.length, facts.bos, facts.modalities)
        initial, self._base = None, None
        if config.model.lora is not None:
            self._base = resuming.adapt_base(run, model, config.model.lora, resume)
        elif resume is None:
            initial = resuming.initial_weights(run, model)
        universal = resume is not None and resume.universal
        self._engine = Engine(model, config, parts, session.device, universal=universal)
        self._ema = EMA(self._engine.masters(), settings.ema)
        if resume:
            resume.load(self._engine, self._ema, session.rank)
        elif initial:
            weights, average = initial
            fill(self._engine.masters(), weights)
            fill(self._ema.slices, average)
        self._masters = self._engine.masters()
        self._start = resume.state.step if resume else 0
        self._throughput = Throughput(run, session.workers, session.device)
        self._task: Task = (
            Distillation(run, self._engine, self._ema, session)
            if config.distill
            else Pretraining(run, model, session.device)
        )
        if session.rank == 0:
            log.info(
                f"{'resuming' if resume else 'starting'} from step {self._start}: {session.workers} workers x "
                f"{parts if settings.micro_tokens is None else 'any number of'} "
                f"micro-batches of up to {settings.micro_size}, {config.data.streams} streams, "
                f"ZeRO stage {settings.zero_stage}, {settings.precision}"
            )

    def _open(self, stack: ExitStack) -> None:
        """Open the tracking store, the watchers and the stream of rows."""
        run, rank, workers = self._run, self._session.rank, self._session.workers
        self._tracker = self._requests = self._pruner = None
        if rank == 0:
            self._pruner = stack.enter_context(checkpoint.Pruner(run.folder, run.config.train.keep))
            self._requests = stack.enter_context(closing(Requests(run.folder)))
            if run.run_id:
                system_metrics = run.config.tracking.system_metrics
                self._tracker = stack.enter_context(run.tracker(system_metrics=system_metrics))
        self._traced = stack.enter_context(profiled(run, rank, self._tracker))
        self._hang = HangWatch(run.folder, rank, run.config.cluster.hang_timeout_s)
        stack.callback(self._hang.end)
        stack.callback(self._engine.close)
        reader = ShardReader(run.data_path, run.manifest, "train")
        task, skipped = self._task, self._skipped
        stack.callback(task.close)

        def prepare(step: int, micros: list[MicroBatch]) -> list[Prepared]:
            return task.prepare(step, micros, skipped.get(step, ()))

        stream = batches(reader, self._order, self._start, rank, workers, self._micro_batch, prepare)
        self._stream = stack.enter_context(closing(stream))

    def train(self) -> dict[str, float]:
        """Train until the last step or a request to stop; return the last logged metrics."""
        config, settings, session = self._run.config, self._run.config.train, self._session
        for step in range(self._start, settings.steps):
            if step > self._start:  # the first one compiles kernels
                self._hang.begin(step)
            self._update(step)
            done = step + 1
            last = done == settings.steps
            validating = done % settings.validate_every == 0 or last
            saving = done % settings.checkpoint_every == 0 or last
            if validating or saving or self._stopping or self._notice:  # only of a step that was finite
                self._settle()
            self._hang.end()
            if self._notice and session.rank == 0:
                log.warning("step %d: %s; saving before that", done, self._notice)
            validation: float | None = None
            samples: tuple[str, ...] = ()
            if validating:
                with _timed(self._times, "validation"):
                    validation, samples = validate(
                        self._run, self._engine, self._ema, session, self._tracker, done
                    )
                self._metrics[f"validation/{config.validation_metric}"] = validation
            if saving or self._stopping or self._notice:
                with _timed(self._times, "checkpoints"):
                    self._save(done, validation, samples)
                self._notice = None
            if self._stopping:
                log.info("stopped at step %d on request", done)
                break
            if self._taken is None:
                self._clock = time.perf_counter()
        with _timed(self._times, "checkpoints"):  # wait for uploads
            session.settle()
        if session.rank == 0:
            times = ", ".join(f"{value:.1f} s {part}" for part, value in self._times.items())
            log.info("the loop took %s", times)
        return self._metrics

    def _update(self, step: int) -> None:
        """Compute the gradients of the global batch and request the update.

        Its figures are read while the device computes the next gradients.
        """
        began = time.perf_counter()
        micros = next(self._stream)
        self._waited += time.perf_counter() - began
        if self._task.reads_weights(step):
            self._settle(running=step)
        self._task.start(step)
        part_losses = []
        for part, micro in enumerate(micros, 1):
            # Seeds dropout; + 1, because the index of a missing row is -1.
            torch.manual_seed(mix_seed(self._run.config.seed + 1, step + 1, int(micro.index[0]) + 1) >> 1)
            loss = self._engine.backward(self._task.batch(micro), last=part == len(micros))
            part_losses.append(loss)
        row_losses = torch.cat(part_losses)  # [slots]
        flags = self._requests.take() if self._requests else (False, False, False)
        shared = torch.cat([row_losses.sum()[None], row_losses.new_tensor(flags)])
        dist.all_reduce(shared)
        self._settle(running=step)
        self._engine.step(step)
        places = np.concatenate([micro.index for micro in micros])
        figures = torch.cat([shared, self._engine.gradient_norm()[None]])
        self._taken = _Taken(step, places, row_losses, figures)

    def _settle(self, running: int | None = None) -> None:
        """Read the figures of the step that was taken, if any, average its weights, and log it.

        The next update must not have begun.

        Args:
            running: the step whose gradients are being computed; logging is not part of its time.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            return
        settings = self._run.config.train
        loss, stop, saving, check_notice, norm = taken.figures()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            _report_nonfinite(self._run, self._session, self._order, taken, self._skipped)
            raise _NonfiniteStep
        self._ema.update(self._masters)
        self._traced()
        self._hang.end()
        self._losses.append(loss)
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._times["training"] += now - self._clock
        self._clock = now
        done = taken.step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            self._log(taken.step, norm)
        self._stopping = self._stopping or bool(stop)
        self._notice = (self._session.notice() if check_notice else None) or self._notice
        if saving and not self._notice:
            self._notice = "the group of workers is about to change"
        if running is not None:
            self._hang.begin(running)

    def _log(self, step: int, norm: float) -> None:
        """Log the steps since the last log line; the last of them is `step`, with its gradient's norm."""
        done, steps = step + 1, self._run.config.train.steps
        self._metrics = metrics = {
            "train/loss": float(np.mean(self._losses)),
            **self._throughput.metrics(len(self._losses), self._seconds),
            "train/data_wait": self._waited / self._seconds,
            "train/learning_rate": self._engine.rate(step),
            "train/gradient_norm": norm,
            "train/epoch": self._order.epoch_of(step),
            "train/memory_gib": _memory(self._session.device),
        }
        self._session.log(metrics, done)
        if self._session.rank == 0:
            left = timedelta(seconds=round((steps - done) * self._seconds / len(self._losses)))
            log.info(
                f"step {done}/{steps}  loss {metrics['train/loss']:.3f}  "
                f"{metrics['train/tokens_per_second']:,.0f} tokens/s  "
                f"data wait {metrics['train/data_wait']:.1%}  left {left}"
            )
        if self._tracker:
            self._tracker.log_metrics(metrics, done)
        self._losses, self._seconds, self._waited = [], 0.0, 0.0

    def _save(self, done: int, validation: float | None, samples: tuple[str, ...]) -> None:
        """Save a checkpoint after `done` updates, with the validation loss and the samples of that step."""
        name = checkpoint.name_of(done)
        local = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        state = checkpoint.TrainState(
            step=done,
            epoch=self._order.epoch_of(done - 1),
            workers=self._session.workers,
            config=self._run.config.model_dump(mode="json"),
            run_id=self._run.run_id,
            validation=validation,
            samples=samples,
            task=self._task.facts() | ({} if self._base is None else {"base": self._base}),
            data=self._run.manifest.identity,
        )
        files = checkpoint.save(local, self._engine, self._ema, state, self._session.rank)
        if self._pruner:
            self._pruner.prune_in_thread(state, files)
        self._session.publish(local, name, self._metrics)


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
