"""From a config to a finished run: Ray, the worker group, MLflow, the consolidated model."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.metrics import Gauge

from pipeline import logs, storage, tracking
from pipeline.config import schema
from pipeline.config.load import dump, flatten
from pipeline.data import text
from pipeline.data.shards import Manifest, ShardReader, check_fits
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import CapabilityError, CheckpointError
from pipeline.evaluation import generation, ngram
from pipeline.evaluation.figures import loss_curve
from pipeline.training import checkpoint
from pipeline.training.loop import Job, train

log = logging.getLogger(__name__)

NGRAM_ROWS = 200_000  # training rows that the reference perplexities are counted on, at most


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind."""

    run: str  # folder
    model: str  # consolidated model
    version: str  # models:/NAME/VERSION
    perplexity: float
    references: dict[str, float]
    samples: tuple[str, ...]
    tracking_uri: str


@contextmanager
def cluster(config: schema.RunConfig) -> Iterator[None]:
    """Join the cluster that this job runs in (RAY_ADDRESS), else start a local Ray for the job."""
    mine = not ray.is_initialized()
    if mine:
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            cpus = max(os.cpu_count() or 1, config.cluster.workers * config.cluster.cpus_per_worker)
            ray.init(num_cpus=cpus, logging_level=logging.WARNING)
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def located(config: schema.RunConfig) -> schema.RunConfig:
    """The config with absolute folders: workers run in other folders than the driver."""
    data = config.data.model_copy(update={"path": config.data.path and storage.resolve(config.data.path)})
    cluster = config.cluster.model_copy(update={"storage": storage.resolve(config.cluster.storage)})
    return config.model_copy(update={"data": data, "cluster": cluster})


def pretrain(config: schema.RunConfig) -> Outcome:
    """Prepare the data if need be, train (or go on training), and leave a registered model.

    Raises:
        ConfigError, DataError: before any worker starts.
        CapabilityError: the cluster has not the resources that were asked for.
    """
    config = located(config)
    run = checkpoint.run_folder(config)
    storage.check_writable(run, "cluster.storage")
    with cluster(config):
        manifest = text.ensure(config)
        check_fits(manifest, config)
        use_gpu = _check_resources(config)
        uri, run_id = _open_run(config, run, manifest)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            _fit(config, Job(config, uri, run_id), run, use_gpu)
            outcome = _finish(config, run, uri, run_id, manifest)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracking.end_run(uri, run_id, status)
    return outcome


def sample(config: schema.RunConfig) -> generation.Samples:
    """Draw `sampling.num_samples` rows of a finished run's model into its folder.

    Raises:
        CheckpointError: there is no such model.
    """
    run, settings = checkpoint.run_folder(config), config.sampling
    model = settings.model or storage.join(run, "model")
    if model.startswith("models:/"):
        model = str(tracking.download_model(tracking.tracking_uri(config), model))
    if not storage.folder_complete(model):
        raise CheckpointError(f"{model}: no such model folder; `python -m jobs.pretrain CONFIG` makes it")
    into = storage.join(run, "samples", f"{settings.order}-{settings.steps}-steps-seed-{settings.seed}")
    with cluster(config):
        use_gpu = _check_resources(config)
        asked = config.cluster
        return generation.generate(
            storage.resolve(model), settings, asked.workers, asked.cpus_per_worker, use_gpu, into
        )


def _check_resources(config: schema.RunConfig) -> bool:
    """Whether the workers get a GPU each.

    Raises:
        CapabilityError: the cluster is too small; without this, Ray would wait for ever.
    """
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    asked = config.cluster
    use_gpu = gpus > 0 if asked.accelerator == "auto" else asked.accelerator == "gpu"
    if use_gpu and gpus < asked.workers:
        raise CapabilityError(
            f"cluster.workers: {asked.workers} workers of one GPU, the cluster has {gpus} GPUs"
        )
    if cpus < asked.workers * asked.cpus_per_worker:
        raise CapabilityError(
            f"cluster.workers: {asked.workers} workers of {asked.cpus_per_worker} CPUs, "
            f"the cluster has {cpus}"
        )
    return use_gpu


def _open_run(config: schema.RunConfig, run: str, manifest: Manifest) -> tuple[str, str]:
    """The MLflow run of this folder: the one it already has, or a new one, recorded in `run.json`."""
    uri = tracking.tracking_uri(config)
    record = storage.join(run, "run.json")
    old = json.loads(storage.read_text(record))["run_id"] if storage.exists(record) else None
    run_id = tracking.open_run(
        uri,
        config.tracking.experiment,
        config.name,
        params=flatten(config.model_dump(mode="json")),
        tags={"folder": run},
        resume_id=old,
    )
    storage.publish_text(record, json.dumps({"run_id": run_id, "tracking_uri": uri}))
    storage.publish_text(storage.join(run, "config.yaml"), dump(config))
    tracking.log_dataset(
        uri,
        run_id,
        name=Path(text.data_path(config)).name,
        digest=manifest.content_key,
        source=text.data_path(config),
        profile={
            "rows": manifest.rows("train"),
            "length": manifest.length,
            "tokenizer": manifest.tokenizer.name,
        },
    )
    return uri, run_id


def _fit(config: schema.RunConfig, job: Job, run: str, use_gpu: bool) -> None:
    """Run the worker group to the end; Ray restarts it after a failure, and the loop resumes by itself."""
    # The loop finds its own checkpoints, and prunes them; Ray's record of an earlier start would miss those.
    storage.remove(storage.join(run, "checkpoint_manager_snapshot.json"))
    asked = config.cluster
    folder, name = run.rsplit("/", 1)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths in the config mean what they mean to the user
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=asked.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": asked.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=asked.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
    trainer.fit()


def _worker(settings: dict[str, Job]) -> None:
    """What Ray Train runs in every worker."""
    logs.show()
    job = settings["job"]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it had to guess
    torch.set_num_threads(job.config.cluster.cpus_per_worker)  # Ray's default is one, whatever was asked
    metrics = train(job, RaySession())
    ray.train.report(metrics)


class RaySession:
    """A worker of Ray Train; its metrics also stand on Ray's dashboard."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Show the newest values as Ray's own metrics (Prometheus), from rank 0."""
        if self.rank > 0:
            return
        for key, value in {**metrics, "train/step": step}.items():
            if key not in self._gauges:
                self._gauges[key] = Gauge("pipeline_" + key.replace("/", "_"), description=key)
            self._gauges[key].set(value)

    def settle(self) -> None:
        """Wait until Ray has taken over everything that was reported."""
        ray.train.get_all_reported_checkpoints()

    def publish(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        """Upload in the background; Ray merges the folders of all ranks."""
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )


def _finish(config: schema.RunConfig, run: str, uri: str, run_id: str, manifest: Manifest) -> Outcome:
    """Consolidate, register, draw the curve, compare with n-grams."""
    last = checkpoint.latest(run)
    if last is None:
        raise CheckpointError(f"{run}: training ended without a usable checkpoint")
    checkpoint.prune(run, config.train.keep)
    state = checkpoint.read_state(last)
    model = storage.join(run, "model")
    tokenizer = load_tokenizer(config.data.tokenizer)
    checkpoint.consolidate(last, config, manifest, tokenizer, model)
    perplexity = float("nan") if state.validation is None else state.validation
    name = config.tracking.register_as or config.name
    version = tracking.register_model(
        uri,
        run_id,
        storage.fetch(model),
        name,
        tags={"step": str(state.step), "validation_perplexity": f"{perplexity:.4f}"},
    )
    references = _references(config, manifest)
    history = tracking.metric_history(uri, run_id, ["train/loss", "validation/perplexity"])
    figure = loss_curve(history, references)
    with tracking.Tracker(uri, run_id) as tracker:
        tracker.log_metrics({f"reference/{k}": v for k, v in references.items()}, state.step)
        tracker.log_figure(figure, "figures/loss_curve.png")
    if storage.is_local(run):
        figure.savefig(Path(run) / "loss_curve.png")
    return Outcome(run, model, f"models:/{name}/{version}", perplexity, references, state.samples, uri)


def _references(config: schema.RunConfig, manifest: Manifest) -> dict[str, float]:
    """Perplexities of n-gram models of the same training rows on the same validation rows."""
    path = text.data_path(config)

    def rows(split: str, most: int) -> np.ndarray:
        reader = ShardReader(path, manifest, split)
        return reader.rows(np.arange(min(len(reader), most)))

    seen, held_out = rows("train", NGRAM_ROWS), rows("validation", config.evaluation.rows)
    return {
        "unigram": ngram.unigram_perplexity([seen], [held_out], manifest.vocabulary),
        "bigram": ngram.bigram_perplexity([seen], [held_out], manifest.vocabulary),
    }
