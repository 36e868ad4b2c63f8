"""Print what a training job's config would need and cost: `plan=GPU` behind the config."""

import os

import ray
import torch

from pipeline import storage, trained
from pipeline.config.model import ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import MANIFEST, Manifest, check_fits
from pipeline.errors import ConfigError
from pipeline.models import model_folder
from pipeline.planning.gpus import select_gpus
from pipeline.planning.plan import report
from pipeline.run import Run
from pipeline.runtime.ray_cluster import join


def plan(config: RunConfig, gpu: str) -> None:
    """Print the plan of a run. Nothing is started and nothing is written.

    Args:
        config: the run's config.
        gpu: a GPU type, or "true" for all types.

    Raises:
        ConfigError: there is no such type, or the model or the data's vocabulary is not known yet.
        DataError: the prepared data does not fit the config.
    """
    gpus = select_gpus(gpu)
    if config.distill is not None and "model" not in config.model_fields_set:
        config = config.model_copy(update={"model": teacher_model(config.distill.teacher)})
    path = Run(config).data_path
    manifest = Manifest.read(path) if storage.exists(storage.join(path, MANIFEST)) else None
    if manifest is not None:
        check_fits(manifest, config)
    print(report(config, gpus, manifest=manifest, available=resources()))


def teacher_model(teacher: str) -> ModelConfig:
    """Return the model section of a teacher, which a distillation without such a section has too.

    Args:
        teacher: `distill.teacher`.

    Raises:
        ConfigError: the teacher is not an existing model folder.
    """
    if not trained.is_path(teacher) or not storage.exists(storage.join(teacher, "model.safetensors")):
        raise ConfigError(
            f"distill.teacher: {teacher!r} is not a model folder, and a plan downloads no models; "
            "expected an existing model folder, or a model section in the config"
        )
    return model_folder.read_config(storage.fetch(teacher))[0]


def resources() -> dict[str, float]:
    """Count the CPUs and GPUs of the Ray cluster at RAY_ADDRESS, or of this machine where that is not set."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    join(address)
    try:
        return ray.cluster_resources()
    finally:
        ray.shutdown()
