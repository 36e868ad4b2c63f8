"""One worker's training, from top to bottom."""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from pipeline.config.schema import RunConfig
from pipeline.data.shards import Manifest, ShardReader
from pipeline.data.stream import ReadingOrder, batches
from pipeline.data.text import data_path
from pipeline.data.tokenizers import load_tokenizer
from pipeline.diffusion import partition
from pipeline.diffusion.objective import training_batch
from pipeline.evaluation import likelihood
from pipeline.models import build
from pipeline.sampling.sampler import sample
from pipeline.tracking import Tracker
from pipeline.training import checkpoint
from pipeline.training.ema import EMA
from pipeline.training.engine import Engine, learning_rate
from pipeline.training.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker."""

    config: RunConfig
    tracking_uri: str | None = None  # None: no tracking
    run_id: str | None = None


def train(job: Job, session: Session) -> dict[str, float]:
    """Train to `train.steps`, from the newest usable checkpoint of the run if there is one.

    Everything random is a function of (seed, step, index in the global batch), and the data's position of the
    step, so a resumed run repeats exactly what an undisturbed one does.

    Returns:
        the last logged metrics.
    """
    config, rank, device = job.config, session.rank, session.device
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
    bos = manifest.special.bos is not None
    slots = len(order.slots(rank, session.workers))
    parts = -(-slots // config.train.micro_batch)

    # Model, optimiser, EMA: equal on all ranks.
    torch.manual_seed(config.seed)
    model = build(config.model, manifest.vocabulary, manifest.length)
    engine = Engine(model, config.optim, config.train, parts, device)
    ema = EMA(engine.masters(), config.train.ema)

    # Resume: rank 0 decides from which checkpoint.
    found = [checkpoint.latest(run) if rank == 0 else None]
    dist.broadcast_object_list(found)
    start = 0
    if found[0] is not None:
        state = checkpoint.read_state(found[0])
        checkpoint.load(found[0], engine, ema, state, session.workers)
        start = state.step
        log.info("resumed from %s", found[0])

    tracker = None
    if rank == 0 and job.tracking_uri and job.run_id:
        spill = Path(tempfile.gettempdir()) / f"tracking-{job.run_id}.jsonl"
        tracker = Tracker(job.tracking_uri, job.run_id, spill, config.tracking.system_metrics)
    masters = engine.masters()
    metrics: dict[str, float] = {}
    interval = _Interval()
    stream = batches(reader, order, start, rank, session.workers, config.train.micro_batch)
    try:
        for step in range(start, config.train.steps):
            began = time.perf_counter()
            micros = next(stream)
            interval.waited += time.perf_counter() - began

            # One update of the global batch.
            t, groups = partition.draw(
                config.seed, step, config.train.batch, manifest.length, config.diffusion.eps, bos
            )
            total = torch.zeros((), device=device)
            for micro in micros:
                torch.manual_seed(_mix(config.seed, step, int(micro.index[0])))  # dropout
                batch = training_batch(
                    micro.tokens,
                    t[micro.index],
                    groups[micro.index],
                    micro.index >= 0,
                    config.diffusion,
                    config.model.kind == "pgm",
                    config.train.batch,
                    bos,
                    device,
                )
                total += engine.backward(batch)
                engine.step(step)
            ema.update(masters)
            dist.all_reduce(total)
            loss, done = float(total), step + 1
            interval.losses.append(loss)
            interval.seconds += time.perf_counter() - began

            if done % config.train.log_every == 0 or done == config.train.steps:
                metrics = {
                    "train/loss": float(np.mean(interval.losses)),
                    "train/learning_rate": learning_rate(step, config.optim, config.train.steps),
                    "train/gradient_norm": engine.gradient_norm(),
                    "train/epoch": order.epoch_of(step),
                    "train/tokens_per_second": (
                        len(interval.losses) * config.train.batch * manifest.length / interval.seconds
                    ),
                    "train/data_wait": interval.waited / interval.seconds,
                    "train/memory_gib": _memory(device),
                }
                left = (config.train.steps - done) * interval.seconds / len(interval.losses)
                if rank == 0:
                    log.info("%s", _line(done, config.train.steps, metrics, left))
                if tracker:
                    tracker.log_metrics(metrics, done)
                interval = _Interval()

            validation: float | None = None
            texts: tuple[str, ...] = ()
            if done % config.train.validate_every == 0 or done == config.train.steps:
                validation, texts = _validate(config, manifest, engine, ema, session, tracker, done)
                metrics["validation/perplexity"] = validation

            if done % config.train.checkpoint_every == 0 or done == config.train.steps:
                if rank == 0:
                    checkpoint.prune(run, config.train.keep)
                local = Path(tempfile.mkdtemp(prefix="checkpoint-")) / checkpoint.name_of(done)
                state = checkpoint.TrainState(
                    step=done,
                    epoch=order.epoch_of(step),
                    workers=session.workers,
                    config=config.model_dump(mode="json"),
                    run_id=job.run_id,
                    validation=validation,
                    samples=texts,
                )
                checkpoint.save(local, engine, ema, state, rank)
                session.publish(local, checkpoint.name_of(done), metrics)
    finally:
        stream.close()
        if tracker:
            tracker.close()
    return metrics


def _validate(
    config: RunConfig,
    manifest: Manifest,
    engine: Engine,
    ema: EMA,
    session: Session,
    tracker: Tracker | None,
    step: int,
) -> tuple[float, tuple[str, ...]]:
    """Validation perplexity of the EMA weights, and sample texts; all ranks call it together."""
    reader = ShardReader(data_path(config), manifest, "validation")
    rows = np.unique(
        np.linspace(0, len(reader) - 1, min(config.evaluation.rows, len(reader))).astype(np.int64)
    )
    with engine.weights(ema.slices) as model:
        sums = likelihood.row_sums(
            model,
            likelihood.masked_batches(
                reader.rows(rows),
                config.evaluation.estimator,
                config.evaluation.draws,
                config.seed,
                config.diffusion.eps,
                manifest.special.bos is not None,
                config.evaluation.batch,
                session.rank,
                session.workers,
                session.device,
            ),
            len(rows),
        ).to(session.device)
        dist.all_reduce(sums)
        # All ranks draw the same samples: under ZeRO-3 no rank can run the model alone.
        tokens = sample(
            model, 2, min(64, config.sampling.steps), config.sampling.seed, bos=manifest.special.bos
        )
    bound = likelihood.summarise(
        sums.cpu(), config.evaluation.estimator, config.evaluation.draws, config.seed
    )
    if session.rank == 0:
        log.info("step %d: validation %s", step, bound)
    tokenizer = load_tokenizer(config.data.tokenizer)
    texts = tuple(tokenizer.decode(row) for row in tokens.tolist())
    if tracker:
        tracker.log_metrics({"validation/perplexity": bound.perplexity, "validation/nats": bound.nats}, step)
        tracker.log_text("\n\n-----\n\n".join(texts), f"samples/step_{step:08d}.txt")
    return bound.perplexity, texts


class _Interval:
    """What is gathered between two log lines."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds = 0.0
        self.waited = 0.0


def _mix(*numbers: int) -> int:
    """One generator seed from several numbers."""
    return int(np.random.SeedSequence([n + 1 for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


def _memory(device: torch.device) -> float:
    """GiB: peak of the device's allocator, or the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _line(done: int, steps: int, metrics: dict[str, float], left: float) -> str:
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"step {done}/{steps}  loss {metrics['train/loss']:.3f}  "
        f"{metrics['train/tokens_per_second']:,.0f} tokens/s  data wait {metrics['train/data_wait']:.1%}  "
        f"left {hours}:{minutes:02d}:{seconds:02d}"
    )
