"""Checkpoints: folders `step_N` that are used only when complete; fallback, pruning and consolidation.

step_00001000/
  optimizer_00000.safetensors  slices of the weights and moments that rank 0 owns, and so on
  ema_00000.safetensors    EMA slices of rank 0, and so on
  files_00000.json         rank 0's files with sizes and SHA-256, and those of the other ranks; a checkpoint is
                           complete when all ranks' lists and files exist
  state.json               step, epoch, validation, config, MLflow run
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import storage, trained
from pipeline.config.model import ModelConfig
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizers import PairTokenizer, Tokenizer
from pipeline.errors import CheckpointError
from pipeline.models import build, model_folder
from pipeline.models.adapters.folder import Base
from pipeline.models.adapters.lora import adapt, merged
from pipeline.models.vq import ImageTokenizer
from pipeline.run import Run
from pipeline.training.ema import AVERAGE, EMA, read_averages
from pipeline.training.engine import OPTIMIZER, Engine
from pipeline.training.slices import Index, index_of

log = logging.getLogger(__name__)
AnyTokenizer = Tokenizer | ImageTokenizer | PairTokenizer
Files = dict[str, tuple[int, str]]  # size and SHA-256 by path in a checkpoint
STATE = "state.json"
UNIVERSAL = "universal"  # in a run's folder: checkpoints converted for another number of workers
_THREADS = 8  # files of a checkpoint that are read at the same time


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
        data: `Manifest.identity` of the data; empty in checkpoints of earlier versions.
    """

    step: int
    epoch: int
    workers: int
    config: dict[str, Any]
    run_id: str | None
    validation: float | None = None
    samples: tuple[str, ...] = ()
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)


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


def save(into: Path, engine: Engine, ema: EMA, state: TrainState, rank: int) -> Files:
    """Write this rank's part of a checkpoint to a local folder; all ranks call it together.

    Args:
        into: folder of this rank.
        engine: model and optimiser.
        ema: average of the weights.
        state: the rest.
        rank: of this worker.

    Returns:
        On rank 0 the files of all ranks, on others their own.

    Raises:
        CheckpointError: the folder cannot be written; it is removed.
    """
    try:
        into.mkdir(parents=True, exist_ok=True)
        if engine.stage > 0 or rank == 0:  # replicated at stage 0
            engine.save(into / f"{OPTIMIZER}_{rank:05d}.safetensors")
            ema.save(into / f"{AVERAGE}_{rank:05d}.safetensors")
        if rank == 0:
            (into / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        files: Files = {
            str(file.relative_to(into)): (file.stat().st_size, storage.sha256(str(file)))
            for file in sorted(into.rglob("*"))
            if file.is_file()
        }
        listing: dict[str, Any] = {"workers": state.workers, "step": state.step, "files": files}
        gathered: list[Any] = [None] * state.workers
        slices = [(*key, values.numel()) for key, values in ema.slices.items()]
        dist.gather_object((files, slices), gathered if rank == 0 else None)
        if rank == 0:  # whoever reads it need not read a list of every rank
            listing["others"] = {name: facts for part, _ in gathered[1:] for name, facts in part.items()}
            writers = gathered if engine.stage > 0 else gathered[:1]
            listing["slices"] = index_of([part for _, part in writers])
        (into / _list_name(rank)).write_text(json.dumps(listing), encoding="utf-8")
    except Exception as error:  # a full disk is an OSError, RuntimeError or SafetensorError
        free = shutil.disk_usage(into.parent).free / 2**20
        shutil.rmtree(into, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {state.step} cannot be saved to {into} ({free:,.0f} MiB free): {error}"
        ) from error
    return files | listing.get("others", {})


def is_average(name: str) -> bool:
    """Return whether a file of a checkpoint holds EMA slices, given its path in the checkpoint."""
    return name.startswith(f"{AVERAGE}_")


def _list_name(rank: int) -> str:
    """Name of the list of a rank's files."""
    return f"files_{rank:05d}.json"


def problems(path: str, hashed: Callable[[str], bool] | None = None) -> list[str]:
    """List what is missing from a checkpoint or damaged in it.

    Args:
        path: folder of the checkpoint.
        hashed: tells of a file whether its SHA-256 is compared, besides its size; None: of every file.

    Returns:
        Descriptions of the problems; empty if the checkpoint can be used.
    """
    files, flaws = promised(path)
    chosen = {name: facts for name, facts in files.items() if hashed is None or hashed(name)}
    return flaws or damages(path, chosen)


def promised(path: str) -> tuple[Files, list[str]]:
    """Read which files a checkpoint has, and list those that are missing or cut; their contents are not read.

    Args:
        path: folder of the checkpoint.

    Returns:
        Size and SHA-256 of every file, and descriptions of the problems.
    """
    stored = storage.sizes(path)
    names = [name for name in stored if name.startswith("files_")]
    if not names:
        return {}, ["no list of files: it was never finished"]
    first = _list_name(0)
    try:
        lists = {name: storage.read_json(storage.join(path, name)) for name in names if name == first}
        if "others" not in lists.get(first, {}):  # of an earlier version, or lost
            contents = _parallel(storage.read_json, [storage.join(path, name) for name in names])
            lists = dict(zip(names, contents, strict=True))
        workers = max(entry["workers"] for entry in lists.values())
        files: Files = {
            file: (int(size), str(digest))
            for entry in lists.values()
            for file, (size, digest) in (entry["files"] | entry.get("others", {})).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"its list of files is damaged: {error}"]
    flaws = [f"worker {r} of {workers} never finished" for r in range(workers) if _list_name(r) not in names]
    if STATE not in files:
        flaws.append(f"{STATE} was not written")
    for file, (size, _) in files.items():
        if file not in stored:
            flaws.append(f"{file} is missing")
        elif stored[file] != size:
            flaws.append(f"{file} has {stored[file]} bytes, expected {size}")
    return files, flaws


def damages(path: str, files: Files) -> list[str]:
    """List the files of a checkpoint whose contents differ from their SHA-256; several are read at a time.

    Args:
        path: folder of the checkpoint, local or remote.
        files: to compare; remote ones are compared in this node's copy, which loading reads too.
    """
    local = storage.fetch(path, files.__contains__) if files else Path()
    digests = _parallel(storage.sha256, [str(local / name) for name in files])
    return [
        f"{name} does not match its SHA-256"
        for (name, (_, expected)), digest in zip(files.items(), digests, strict=True)
        if digest != expected
    ]


def _parallel(function: Callable[[str], Any], items: Sequence[str]) -> list[Any]:
    """Call a function that mostly waits for files, on all items in a few threads."""
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return list(pool.map(function, items))


def slices_of(path: str) -> Index | None:
    """Read which rank stored which slices of a complete checkpoint; None: an earlier version wrote it.

    Args:
        path: folder of the checkpoint.
    """
    return storage.read_json(storage.join(path, _list_name(0))).get("slices")


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


def latest(folder: str, check: Callable[[str], list[str]] = problems) -> str | None:
    """Find the newest usable checkpoint in a run's folder; newer ones that cannot be used are logged.

    Args:
        folder: of the run.
        check: lists the problems of a checkpoint.

    Returns:
        The checkpoint's folder, or None if there is no usable one.
    """
    for path in _paths(folder):
        flaws = check(path)
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
    return next((path for path in _paths(folder) if not problems(path, STATE.__eq__)), None)


def remove_after(folder: str, step: int) -> None:
    """Remove the checkpoints of later steps than `step`, which a resumed run will write again.

    Args:
        folder: of the run.
        step: last one to keep.
    """
    for later in steps(folder):
        if later > step:
            path = storage.join(folder, name_of(later))
            storage.remove(universal_path(path))
            storage.remove(path, marked=False)


def prune(folder: str, keep: int) -> None:
    """Remove all complete checkpoints but the `keep` newest and the one of best validation.

    Args:
        folder: of the run.
        keep: number of checkpoints.
    """
    Pruner(folder, keep).prune()


class Pruner:
    """Removes the checkpoints that a run needs no more, and remembers which ones are complete.

    A checkpoint costs two listings, of its folder and of one that is removed, and the removal. The store's pages of
    1,000 names are all that grows with the workers. As a context manager it works in a thread, and waits at the end.

    Args:
        folder: of the run.
        keep: number of checkpoints that are kept, besides the one of best validation.
    """

    def __init__(self, folder: str, keep: int) -> None:
        self._folder, self._keep = folder, keep
        # State and sizes of checkpoints that are perhaps not complete yet, by step.
        self._written: dict[int, tuple[TrainState, dict[str, int]]] = {}
        self._complete: dict[int, float | None] | None = None  # validation by step
        self._converted: set[str] = set()

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prune")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def written(self, state: TrainState, files: Files) -> None:
        """Take note of a checkpoint that is being published.

        Args:
            state: its state.
            files: of all its ranks.
        """
        self._written[state.step] = (state, {name: size for name, (size, _) in files.items()})

    def prune_in_thread(self, state: TrainState, files: Files) -> None:
        """Call `prune`, then `written` for the next checkpoint, in the thread; an outage of the store is logged.

        Args:
            state: of the next checkpoint.
            files: of all its ranks.
        """

        def work() -> None:
            try:
                self.prune()
            except Exception as error:
                log.warning("old checkpoints of %s could not be removed: %s", self._folder, error)
            self.written(state, files)

        self._pool.submit(work)

    def prune(self) -> None:
        """Remove all complete checkpoints but those that are kept; incomplete ones stay."""
        if self._complete is None:
            self._look()
        assert self._complete is not None
        for step, (state, sizes) in list(self._written.items()):
            stored = storage.sizes(self._path(step))
            lists = {_list_name(rank) for rank in range(state.workers)}
            if lists <= stored.keys() and sizes.items() <= stored.items():
                self._complete[step] = state.validation
                del self._written[step]
        scored = [
            (score, step)
            for step, score in self._complete.items()
            if score is not None and math.isfinite(score)
        ]
        kept = {*sorted(self._complete)[-self._keep :], *([min(scored)[1]] if scored else [])}
        for step in set(self._complete) - kept:
            if name_of(step) in self._converted:
                storage.remove(universal_path(self._path(step)))
            storage.remove(self._path(step), marked=False)
            del self._complete[step]

    def _look(self) -> None:
        """Find the complete checkpoints that are there from earlier starts."""
        self._converted = set(storage.listing(storage.join(self._folder, UNIVERSAL)))
        paths = {step: self._path(step) for step in steps(self._folder)}
        self._complete = {
            step: read_state(path).validation for step, path in paths.items() if not promised(path)[1]
        }

    def _path(self, step: int) -> str:
        """Folder of a step's checkpoint."""
        return storage.join(self._folder, name_of(step))


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
    if flaws := problems(path, is_average):
        raise CheckpointError(f"{path} is not usable: " + "; ".join(flaws))
    averages = read_averages(storage.fetch(path, is_average))
    with torch.device("meta"):
        facts = manifest.facts
        model = build(config, facts.vocab_size, facts.length, facts.bos, facts.modalities)
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
        model_folder.write(local, section, facts, weights, background, None if base is None else asdict(base))
        if tokenizer is not None:
            tokenizer.save(local)
