"""What `plan=GPU` behind a training job's config does: tells what the run would need and cost."""

import logging
import os

import ray
import torch

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import MANIFEST, Manifest, check_fits
from pipeline.data.prepare.prepare import data_path
from pipeline.errors import ConfigError
from pipeline.models import model_folder
from pipeline.planning.gpus import select_gpus
from pipeline.planning.plan import report


def plan(config: RunConfig, gpu: str) -> None:
    """Print the plan; starts nothing and writes nothing."""
    gpus = select_gpus(gpu)
    config = with_model(config)
    path = data_path(config)
    manifest = Manifest.read(path) if storage.exists(storage.join(path, MANIFEST)) else None
    if manifest is not None:
        check_fits(manifest, config)
    print(report(config, gpus, manifest, resources()))


def with_model(config: RunConfig) -> RunConfig:
    """The config of a distillation with its teacher's model, where it names none of its own.

    Raises:
        ConfigError: the teacher is not a model folder that is there.
    """
    if config.distill is None or "model" in config.model_fields_set:
        return config
    teacher = config.distill.teacher
    if teacher.startswith("models:/") or not storage.exists(storage.join(teacher, "model.safetensors")):
        raise ConfigError(
            f"distill.teacher: {teacher!r} is no model folder, and a plan fetches none; "
            "expected such a folder, or a model section"
        )
    model, _ = model_folder.read_config(storage.fetch(teacher))
    return config.model_copy(update={"model": model})


def resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster that this process is in (RAY_ADDRESS), or of this machine."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    ray.init(address=address, logging_level=logging.WARNING)
    try:
        return ray.cluster_resources()
    finally:
        ray.shutdown()
