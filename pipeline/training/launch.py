"""Pretraining, distillation and sampling from a config to their results."""

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from pipeline import storage, tracking
from pipeline.config.load import dump, flatten
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import check_fits
from pipeline.errors import ConfigError, StoppedError
from pipeline.metrics import draw
from pipeline.metrics.class_names import with_class_ids
from pipeline.metrics.given import given_by, refuse
from pipeline.models import model_folder
from pipeline.reports.view import VIEW
from pipeline.run import Run
from pipeline.runtime import claims
from pipeline.runtime.ray_cluster import available_resources, check_visible, joined_cluster, stoppable
from pipeline.training import distillation, resume
from pipeline.training.finish import RunResult, finish
from pipeline.training.worker_group import run_group

log = logging.getLogger(__name__)


def pretrain(config: RunConfig) -> RunResult:
    """Pretrain a model, or continue its training; prepare the data first where it is missing.

    Args:
        config: of a run without a `distill` section.

    Returns:
        Where the registered model and its figures are.

    Raises:
        ConfigError, DataError: before any worker starts; so if another job trains the run.
        CapabilityError: the cluster is too small for `cluster.workers`.
        StoppedError: the user stopped the run.
        TrainingError: the workers failed too often.
    """
    if config.distill is not None:
        raise ConfigError("distill: a section for jobs.distill; jobs.pretrain takes configs without it")
    return train_to_end(Run.of(config), {})


def distill(config: RunConfig) -> RunResult:
    """Distil a teacher into students that need half the steps after every round, and register each of them.

    Args:
        config: of a run with a `distill` section.

    Returns:
        Where the last round's registered model and its figures are.

    Raises:
        CheckpointError: there is no such teacher.
        ConfigError, DataError, CapabilityError, StoppedError, TrainingError: as `pretrain`.
    """
    run = Run.of(config)
    with _claimed(run):
        run = distillation.with_teacher(run)
        return _train_to_end(run, {"teacher": distillation.read_origin(run.folder)["teacher"]}, run_group)


def train_to_end(run: Run, tags: dict[str, str], train: Callable[[Run], None] | None = None) -> RunResult:
    """Train on the cluster until the last step, in one MLflow run.

    Args:
        run: as `Run.of` gives it.
        tags: of the MLflow run.
        train: runs the workers until the last step; None: `run_group`.

    Returns:
        Where the registered model and its figures are.

    Raises:
        PipelineError: as `pretrain` and `distill`.
    """
    # A sweep owns the folders of its trials: what still owns one is the dying trial of a killed driver.
    with _claimed(run, wait=train is not None):
        return _train_to_end(run, tags, train or run_group)


def _claimed(run: Run, wait: bool = False) -> AbstractContextManager[None]:
    """Own the run's folder: two jobs never train in one."""
    return claims.held(run.folder, "cluster.storage", f"run {run.config.name!r}", "trained", wait)


def _train_to_end(run: Run, tags: dict[str, str], train: Callable[[Run], None]) -> RunResult:
    """Train in a folder that this process owns."""
    refuse(run.config.sampling, "training")
    data = run.config.data
    if data.kind == "text" and data.held_out == "all":
        raise ConfigError(
            "data.validation_documents: 'all' holds every document out, for evaluation only; "
            "expected a number of documents to train on the others"
        )
    resume.precheck(run)
    with joined_cluster(run.config.cluster), stoppable(run.folder) as stop:
        uri = run.tracking_uri
        run = run.replace(given_resources=available_resources(run.config.cluster))
        check_visible(run.folder, uri)
        tracking.check_store(run.folder, uri, run.config.tracking.experiment)
        run = run.with_data()
        resume.check_data(run)
        check_fits(run.manifest, run.config)
        if run.config.distill is not None:
            distillation.check_teacher(run)
        run_id = _open_mlflow_run(run, tags)
        with tracking.ending(uri, run_id):
            run = run.replace(run_id=run_id)
            train(run)
            if stop.is_set():
                raise StoppedError(
                    "stopped on request after a checkpoint; the same command continues the run"
                )
            return finish(run)


def sample(config: RunConfig) -> draw.Samples:
    """Draw `sampling.num_samples` rows from a model and write them to the run's folder.

    Args:
        config: names the model by `sampling.model`, or by the run that made it.

    Returns:
        The rows, and the folder that holds them.

    Raises:
        CheckpointError: there is no such model.
        ConfigError, DataError, CapabilityError: what is given does not fit the model, before the model is loaded.
    """
    run, settings = Run.of(config), config.sampling
    model = run.sampled_model()
    local = storage.fetch(model)
    with_class_ids(settings, model_folder.read_config(local)[1].class_names)
    given = given_by(settings, local)
    name = f"{settings.order}-{settings.steps}-steps-seed-{settings.seed}"
    if given is not None:  # samples around nothing, and around something else, have folders of their own
        digest = hashlib.sha256(repr((given.text, sorted(given.known.items()))).encode()).hexdigest()[:8]
        name = f"{name}-{settings.given[0]}-{digest}"
        # One token a step is the most, and what an autoregressive model takes.
        settings = settings.model_copy(update={"steps": min(settings.steps, given.unknown)})
    into = storage.join(run.folder, "samples", name)
    with run.in_mlflow() if settings.view else nullcontext(run) as run, joined_cluster(config.cluster):
        samples = draw.generate(model, settings, available_resources(config.cluster), into, given)
        if settings.view:
            page = storage.join(into, VIEW)
            with run.tracker(into) as tracker:
                tracker.log_artifact(storage.fetch(page), f"samples/{name}")
            log.info("page of the steps: %s, in MLflow run %s as samples/%s/%s", page, run.run_id, name, VIEW)
        return samples


def _open_mlflow_run(run: Run, tags: dict[str, str]) -> str:
    """Open, or continue, the MLflow run of the run's folder, and log the config and the data."""
    config, uri, manifest = run.config, run.tracking_uri, run.manifest
    params = flatten(config.model_dump(mode="json"))
    run_id = tracking.open_recorded_run(
        run.folder, uri, config.tracking.experiment, config.name, params, tags
    )
    storage.publish_text(storage.join(run.folder, "config.yaml"), dump(config))
    rows, tokenizer = manifest.rows("train"), manifest.tokenizer.name
    profile = {"rows": rows, "length": manifest.length, "tokenizer": tokenizer}
    tracking.log_dataset(uri, run_id, digest=manifest.content_key, source=run.data_path, profile=profile)
    return run_id
