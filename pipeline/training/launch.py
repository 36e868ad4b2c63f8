"""From a config to a finished run: Ray, the worker group, MLflow, the consolidated model."""

import json
import logging
import os
from pathlib import Path
from typing import Literal

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

from pipeline import errors, logs, storage, tracking
from pipeline.config import schema
from pipeline.config.load import dump, flatten
from pipeline.data import prepared
from pipeline.data.shards import Manifest, check_fits
from pipeline.errors import CheckpointError, ConfigError, PipelineError, TrainingError
from pipeline.evaluation import generation
from pipeline.training import checkpoint, distillation, resume
from pipeline.training.cluster import check_resources, check_visible, cluster, stoppable
from pipeline.training.loop import Job, train
from pipeline.training.outcome import Outcome, finish

log = logging.getLogger(__name__)

FATAL = "fatal.json"  # in the run's folder: an error that no restart can mend


def located(config: schema.RunConfig) -> schema.RunConfig:
    """The config with absolute folders: workers run in other folders than the driver."""
    data = config.data.model_copy(update={"path": config.data.path and storage.resolve(config.data.path)})
    cluster = config.cluster.model_copy(update={"storage": storage.resolve(config.cluster.storage)})
    distill = config.distill
    if distill is not None and not distill.teacher.startswith("models:/"):
        distill = distill.model_copy(update={"teacher": storage.resolve(distill.teacher)})
    return config.model_copy(update={"data": data, "cluster": cluster, "distill": distill})


def pretrain(config: schema.RunConfig) -> Outcome:
    """Prepare the data if need be, train (or go on training), and leave a registered model.

    Raises:
        ConfigError, DataError: before any worker starts.
        CapabilityError: the cluster has not the resources that were asked for.
    """
    if config.distill is not None:
        raise ConfigError("distill: a section for jobs.distill; jobs.pretrain takes configs without it")
    return _carry_out(located(config), {})


def distill(config: schema.RunConfig) -> Outcome:
    """Distil a teacher into students that need half the steps after every round, and register each of them.

    Raises:
        ConfigError, DataError, CheckpointError, CapabilityError: before any worker starts.
    """
    config = located(config)
    run = checkpoint.run_folder(config)
    storage.check_writable(run, "cluster.storage")
    config = distillation.with_teacher(config)
    return _carry_out(config, {"teacher": distillation.teacher_name(run)})


def _carry_out(config: schema.RunConfig, tags: dict[str, str]) -> Outcome:
    """Train to the end on the cluster, in one MLflow run."""
    run = checkpoint.run_folder(config)
    storage.check_writable(run, "cluster.storage")
    resume.precheck(run, config)
    with cluster(config), stoppable(run) as stop:
        uri = tracking.tracking_uri(config)
        use_gpu = check_resources(config)
        check_visible(run, uri)
        manifest = prepared.ensure(config)
        check_fits(manifest, config)
        if config.distill is not None:
            distillation.check_teacher(config, run, manifest)
        run_id = _open_run(config, run, uri, manifest, tags)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            _fit(config, Job(config, uri, run_id), run, use_gpu)
            if stop.is_set():
                status = "KILLED"
                raise TrainingError("stopped as asked, after a checkpoint; the same command goes on")
            outcome = finish(config, run, uri, run_id, manifest, use_gpu)
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
    model = model_folder(config)
    into = storage.join(run, "samples", f"{settings.order}-{settings.steps}-steps-seed-{settings.seed}")
    with cluster(config):
        use_gpu = check_resources(config)
        asked = config.cluster
        return generation.generate(model, settings, asked.workers, asked.cpus_per_worker, use_gpu, into)


def model_folder(config: schema.RunConfig) -> str:
    """Absolute folder of `sampling.model`, or of the run's own model.

    Raises:
        CheckpointError: there is no such model.
    """
    model = config.sampling.model or storage.join(checkpoint.run_folder(config), "model")
    if model.startswith("models:/"):
        model = str(tracking.download_model(tracking.tracking_uri(config), model))
    if not storage.folder_complete(model):
        raise CheckpointError(f"{model}: no such model folder; `python -m jobs.pretrain CONFIG` makes it")
    return storage.resolve(model)


def _open_run(config: schema.RunConfig, run: str, uri: str, manifest: Manifest, tags: dict[str, str]) -> str:
    """The MLflow run of this folder: the one it already has, or a new one, recorded in `run.json`."""
    record = storage.join(run, "run.json")
    old = json.loads(storage.read_text(record))["run_id"] if storage.exists(record) else None
    run_id = tracking.open_run(
        uri,
        config.tracking.experiment,
        config.name,
        params=flatten(config.model_dump(mode="json")),
        tags={"folder": run, **tags},
        resume_id=old,
    )
    storage.publish_text(record, json.dumps({"run_id": run_id, "tracking_uri": logs.shown(uri)}))
    storage.publish_text(storage.join(run, "config.yaml"), dump(config))
    tracking.log_dataset(
        uri,
        run_id,
        name=Path(prepared.data_path(config)).name,
        digest=manifest.content_key,
        source=prepared.data_path(config),
        profile={
            "rows": manifest.rows("train"),
            "length": manifest.length,
            "tokenizer": manifest.tokenizer.name,
        },
    )
    return run_id


def _fit(config: schema.RunConfig, job: Job, run: str, use_gpu: bool) -> None:
    """Run the worker group to the end; Ray restarts it after a failure, and the loop resumes by itself."""
    # The loop finds its own checkpoints, and prunes them; Ray's record of an earlier start would miss those.
    storage.remove(storage.join(run, "checkpoint_manager_snapshot.json"))
    asked = config.cluster
    folder, name = run.rsplit("/", 1)
    filesystem, folder = storage.arrow(folder)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths in the config mean what they mean to the user
    fatal = storage.join(run, FATAL)
    storage.remove(fatal)
    trainer = _Trainer(
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
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=asked.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )
    try:
        trainer.fit()
    finally:
        if storage.exists(fatal):  # a user's mistake, found by a worker: say that, not what it led to
            told = json.loads(storage.read_text(fatal))
            storage.remove(fatal)
            raise getattr(errors, told["kind"])(told["message"]) from None


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to `stoppable`; Ray's own handler would end the run without a checkpoint."""

    def _register_sigint_handler(self, controller: object) -> None:
        pass


def _worker(settings: dict[str, Job]) -> None:
    """What Ray Train runs in every worker."""
    logs.show()
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train repeats every report, from every worker
    job = settings["job"]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it had to guess
    torch.set_num_threads(job.config.cluster.cpus_per_worker)  # Ray's default is one, whatever was asked
    fatal = storage.join(checkpoint.run_folder(job.config), FATAL)
    session = RaySession()
    if storage.exists(fatal):  # trying again cannot help: end quietly, the driver tells why
        return
    try:
        metrics = train(job, session)
    except PipelineError as error:
        storage.publish_text(fatal, json.dumps({"kind": type(error).__name__, "message": str(error)}))
        raise
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
