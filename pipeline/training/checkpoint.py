"""Checkpoints: folders `step_N` that are used only when complete; fallback, pruning and consolidation.

step_00001000/
  zero/                    DeepSpeed's shards of model and optimiser, one set per rank
  ema_00000.safetensors    EMA slices of rank 0, and so on
  files_00000.json         rank 0's files with sizes and SHA-256; a checkpoint is complete when all ranks' lists exist
  state.json               step, epoch, validation, config, MLflow run
"""

import json
import logging
import math
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import storage, trained
from pipeline.config.model import ModelConfig
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import CheckpointError
from pipeline.models import build, model_folder
from pipeline.models.adapters.folder import Base
from pipeline.models.adapters.lora import adapt, merged
from pipeline.models.vq import ImageTokenizer
from pipeline.run import Run
from pipeline.training.ema import EMA, read_averages
from pipeline.training.engine import Engine

log = logging.getLogger(__name__)
AnyTokenizer = Tokenizer | ImageTokenizer
STATE = "state.json"
UNIVERSAL = "universal"  # in a run's folder: checkpoints converted for another number of workers


@dataclass(frozen=True)
class TrainState:
    """The state of a run that is not a tensor; the position in the data and all randomness follow from `step`.

    Attributes:
        step: number of updates done.
        epoch: of the data.
        workers: size of the group that wrote the checkpoint.
        config: of the run, as JSON values.
        run_id: of the MLflow run; None: not tracked.
        validation: value of the validation at this step, lower is better; None: there was none.
        samples: texts drawn at that validation.
        task: facts about the task, such as the round of a distillation and its teacher.
    """

    step: int
    epoch: int
    workers: int
    config: dict[str, Any]
    run_id: str | None
    validation: float | None = None
    samples: tuple[str, ...] = ()
    task: dict[str, Any] = field(default_factory=dict)


def name_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def universal_path(path: str) -> str:
    """Return the folder of a checkpoint's form for another number of workers.

    Args:
        path: folder of the checkpoint.
    """
    folder, name = path.rsplit("/", 1)
    return storage.join(folder, UNIVERSAL, name)


def save(into: Path, engine: Engine, ema: EMA, state: TrainState, rank: int) -> None:
    """Write this rank's part of a checkpoint to a local folder; all ranks call it together.

    Args:
        into: folder of this rank.
        engine: model and optimiser.
        ema: average of the weights.
        state: the rest.
        rank: of this worker.

    Raises:
        CheckpointError: the folder cannot be written; it is removed.
    """
    try:
        into.mkdir(parents=True, exist_ok=True)
        engine.save(into)
        if engine.stage > 0 or rank == 0:  # replicated at stage 0
            ema.save(into / f"ema_{rank:05d}.safetensors")
        if rank == 0:
            (into / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        files = {
            str(file.relative_to(into)): [file.stat().st_size, storage.sha256(str(file))]
            for file in sorted(into.rglob("*"))
            if file.is_file()
        }
        listing = {"workers": state.workers, "step": state.step, "files": files}
        (into / _list_name(rank)).write_text(json.dumps(listing), encoding="utf-8")
    except Exception as error:  # a full disk is an OSError, RuntimeError or SafetensorError
        free = shutil.disk_usage(into.parent).free / 2**20
        shutil.rmtree(into, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {state.step} cannot be saved to {into} ({free:,.0f} MiB free): {error}"
        ) from error


def is_average(name: str) -> bool:
    """Return whether a file of a checkpoint holds EMA slices, given its path in the checkpoint."""
    return name.startswith("ema_")


def _list_name(rank: int) -> str:
    """Name of the list of a rank's files."""
    return f"files_{rank:05d}.json"


def problems(path: str, contents: bool = True) -> list[str]:
    """List what is missing from a checkpoint or damaged in it.

    Args:
        path: folder of the checkpoint.
        contents: compare the SHA-256 of every file; False: only that of the state.

    Returns:
        Descriptions of the problems; empty if the checkpoint can be used.
    """
    names = [name for name in storage.listing(path) if name.startswith("files_")]
    if not names:
        return ["no list of files: it was never finished"]
    try:
        lists = {name: storage.read_json(storage.join(path, name)) for name in names}
        workers = max(entry["workers"] for entry in lists.values())
        files = {file: facts for entry in lists.values() for file, facts in entry["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"its list of files is damaged: {error}"]
    flaws = [f"worker {r} of {workers} never finished" for r in range(workers) if _list_name(r) not in lists]
    if STATE not in files:
        flaws.append(f"{STATE} was not written")
    for file, (size, digest) in files.items():
        where = storage.join(path, *file.split("/"))
        if not storage.exists(where):
            flaws.append(f"{file} is missing")
        elif (stored := storage.size(where)) != size:
            flaws.append(f"{file} has {stored} bytes, expected {size}")
        elif (contents or file == STATE) and storage.sha256(where) != digest:
            flaws.append(f"{file} does not match its SHA-256")
    return flaws


def read_state(path: str) -> TrainState:
    """Read the state of a complete checkpoint.

    Args:
        path: folder of the checkpoint.
    """
    fields = storage.read_json(storage.join(path, STATE))
    return TrainState(**{**fields, "samples": tuple(fields["samples"])})


def steps(folder: str) -> list[int]:
    """List the steps of all checkpoints in a run's folder, complete or not, in ascending order.

    Args:
        folder: of the run.
    """
    return sorted(int(name[5:]) for name in storage.listing(folder) if re.fullmatch(r"step_\d+", name))


def _paths(folder: str) -> list[str]:
    """Folders of all checkpoints of a run, the newest first."""
    return [storage.join(folder, name_of(step)) for step in reversed(steps(folder))]


def latest(folder: str) -> str | None:
    """Find the newest usable checkpoint in a run's folder; newer ones that cannot be used are logged.

    Args:
        folder: of the run.

    Returns:
        The checkpoint's folder, or None if there is no usable one.
    """
    for path in _paths(folder):
        flaws = problems(path)
        if not flaws:
            return path
        log.warning("checkpoint %s is not usable: %s; falling back to the one before", path, "; ".join(flaws))
    return None


def newest(folder: str) -> str | None:
    """Find the newest checkpoint whose files all exist; their contents are not compared with their hashes.

    Args:
        folder: of the run.

    Returns:
        The checkpoint's folder, or None if there is none.
    """
    return next((path for path in _paths(folder) if not problems(path, contents=False)), None)


def remove_after(folder: str, step: int) -> None:
    """Remove the checkpoints of later steps than `step`, which a resumed run will write again.

    Args:
        folder: of the run.
        step: last one to keep.
    """
    for later in steps(folder):
        if later > step:
            _remove(storage.join(folder, name_of(later)))


def prune(folder: str, keep: int) -> None:
    """Remove all complete checkpoints but the `keep` newest and the one of best validation.

    Args:
        folder: of the run.
        keep: number of checkpoints.
    """
    complete = [path for path in _paths(folder) if not problems(path, contents=False)]
    scores = {path: read_state(path).validation for path in complete}
    scored = [(score, path) for path, score in scores.items() if score is not None and math.isfinite(score)]
    kept = {*complete[:keep], *([min(scored)[1]] if scored else [])}
    for path in set(complete) - kept:
        _remove(path)


def _remove(path: str) -> None:
    """Remove a checkpoint and its converted form."""
    storage.remove(universal_path(path))
    storage.remove(path)


def ema_weights(path: str, config: ModelConfig, manifest: Manifest) -> dict[str, Tensor]:
    """Read the full float32 EMA weights of a checkpoint that any number of workers wrote; of an adapter its factors.

    Args:
        path: folder of the checkpoint.
        config: of the model.
        manifest: of the data that the model was trained on.

    Returns:
        Weights by parameter name, in the parameters' shapes.

    Raises:
        CheckpointError: the checkpoint is incomplete, or of another model.
    """
    if flaws := problems(path):
        raise CheckpointError(f"{path} is not usable: " + "; ".join(flaws))
    averages = read_averages(storage.fetch(path, is_average))
    with torch.device("meta"):
        model = build(config, manifest.vocabulary, manifest.length, manifest.special.bos)
        if config.lora is not None:
            adapt(model, config.lora)
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in averages or averages[name].numel() != parameter.numel():
            raise CheckpointError(
                f"{path}: EMA of {name} {list(parameter.shape)} is not whole; another model's checkpoint?"
            )
        tensors[name] = averages[name].view(parameter.shape)
    return tensors


def consolidate(path: str, run: Run, tokenizer: AnyTokenizer) -> None:
    """Write a checkpoint's EMA weights as the run's model folder, whole or not at all.

    Those of an adapter are written as the run's adapter folder, and added to the model's weights.

    Args:
        path: folder of the checkpoint.
        run: with its manifest.
        tokenizer: kept in the model folder.

    Raises:
        CheckpointError: the checkpoint is incomplete, or of another model; or the model that it adapts has changed.
    """
    config, state, figures = run.config, read_state(path), {}
    if state.validation is not None:
        estimator = "arccos" if config.validation_metric == "loss" else config.evaluation.estimator
        figures = {
            f"validation_{config.validation_metric}": state.validation,
            "estimator": f"{estimator}, {config.evaluation.draws} draw(s), EMA weights",
            "step": state.step,
        }
    weights = ema_weights(path, config.model, run.manifest)
    if config.model.lora is not None:
        assert config.train.init_from is not None
        local, name = run.find_model("train.init_from", config.train.init_from)
        base = Base(storage.resolve(name) if trained.is_path(name) else name, state.task["base"])
        original = trained.read(local, uri=run.tracking_uri).denoiser.state_dict()
        base.check(original)
        publish_model(run, run.adapter_folder, weights, figures, tokenizer, base)
        weights = merged(original, weights, config.model.lora)
    publish_model(run, run.model_folder, weights, figures, tokenizer)


def publish_model(
    run: Run,
    target: str,
    weights: dict[str, Tensor],
    figures: dict[str, Any],
    tokenizer: AnyTokenizer | None,
    base: Base | None = None,
) -> None:
    """Write weights as a model folder or, with a base, as an adapter folder, whole or not at all.

    Args:
        run: with its manifest; its model section describes the weights.
        target: the model folder.
        weights: float32 weights by parameter name.
        figures: what was measured of the model, by name.
        tokenizer: kept in the model folder; None: the folder has none.
        base: the model that the weights adapt.

    Raises:
        DataError: the folder cannot be written.
    """
    facts = run.manifest.facts
    background = model_folder.Background(figures, run.config.model_dump(mode="json"))
    with storage.publishing_folder(target) as local:
        section = run.config.model if base is not None else run.config.model.merged
        model_folder.write(local, section, facts, weights, background, base and asdict(base))
        if tokenizer is not None:
            tokenizer.save(local)
