"""From a config to a finished run: Ray, the worker group, MLflow, the consolidated model."""

from collections.abc import Callable
from pathlib import Path

from pipeline import storage, tracking
from pipeline.config import schema
from pipeline.config.load import dump, flatten
from pipeline.data.manifest import Manifest, check_fits
from pipeline.data.prepare import prepare
from pipeline.errors import CheckpointError, ConfigError, StoppedError
from pipeline.metrics import draw
from pipeline.runtime.ray_cluster import actors_now, check_resources, check_visible, cluster, stoppable
from pipeline.training import checkpoint, distillation, resume
from pipeline.training.finish import RunResult, finish
from pipeline.training.loop import Job
from pipeline.training.worker_group import run_group

Group = Callable[[schema.RunConfig, Job, str, bool], None]


def located(config: schema.RunConfig) -> schema.RunConfig:
    """The config with absolute folders: workers run in other folders than the driver."""
    data = config.data.model_copy(update={"path": config.data.path and storage.resolve(config.data.path)})
    cluster = config.cluster.model_copy(update={"storage": storage.resolve(config.cluster.storage)})
    distill = config.distill
    if distill is not None and not distill.teacher.startswith("models:/"):
        distill = distill.model_copy(update={"teacher": storage.resolve(distill.teacher)})
    return config.model_copy(update={"data": data, "cluster": cluster, "distill": distill})


def pretrain(config: schema.RunConfig) -> RunResult:
    """Prepare the data if need be, train (or go on training), and leave a registered model.

    Raises:
        ConfigError, DataError: before any worker starts.
        CapabilityError: the cluster has not the resources that were asked for.
    """
    if config.distill is not None:
        raise ConfigError("distill: a section for jobs.distill; jobs.pretrain takes configs without it")
    return carry_out(located(config), {})


def distill(config: schema.RunConfig) -> RunResult:
    """Distil a teacher into students that need half the steps after every round, and register each of them.

    Raises:
        ConfigError, DataError, CheckpointError, CapabilityError: before any worker starts.
    """
    config = located(config)
    run = checkpoint.run_folder(config)
    storage.check_writable(run, "cluster.storage")
    config = distillation.with_teacher(config)
    return carry_out(config, {"teacher": distillation.teacher_name(run)})


def carry_out(config: schema.RunConfig, tags: dict[str, str], group: Group | None = None) -> RunResult:
    """Train to the end on the cluster, in one MLflow run.

    Args:
        config: `located`.
        tags: of the run.
        group: what runs the workers to the end; None: `run_group`.
    """
    run = checkpoint.run_folder(config)
    storage.check_writable(run, "cluster.storage")
    resume.precheck(run, config)
    with cluster(config), stoppable(run) as stop:
        uri = tracking.tracking_uri(config)
        use_gpu = check_resources(config)
        check_visible(run, uri)
        manifest = prepare.ensure(config)
        check_fits(manifest, config)
        if config.distill is not None:
            distillation.check_teacher(config, run, manifest)
        run_id = _open_run(config, run, uri, manifest, tags)
        with tracking.ending(uri, run_id):
            (group or run_group)(config, Job(config, uri, run_id), run, use_gpu)
            if stop.is_set():
                raise StoppedError("stopped as asked, after a checkpoint; the same command goes on")
            return finish(config, run, uri, run_id, manifest, use_gpu)


def sample(config: schema.RunConfig) -> draw.Samples:
    """Draw `sampling.num_samples` rows of a finished run's model into its folder.

    Raises:
        CheckpointError: there is no such model.
    """
    run, settings = checkpoint.run_folder(config), config.sampling
    model = run_model_folder(config)
    into = storage.join(run, "samples", f"{settings.order}-{settings.steps}-steps-seed-{settings.seed}")
    with cluster(config):
        return draw.generate(model, settings, actors_now(config), into)


def run_model_folder(config: schema.RunConfig) -> str:
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
    """The MLflow run of this folder, with its config and its data."""
    params = flatten(config.model_dump(mode="json"))
    run_id = tracking.open_recorded_run(run, uri, config.tracking.experiment, config.name, params, tags)
    storage.publish_text(storage.join(run, "config.yaml"), dump(config))
    tracking.log_dataset(
        uri,
        run_id,
        name=Path(prepare.data_path(config)).name,
        digest=manifest.content_key,
        source=prepare.data_path(config),
        profile={
            "rows": manifest.rows("train"),
            "length": manifest.length,
            "tokenizer": manifest.tokenizer.name,
        },
    )
    return run_id
