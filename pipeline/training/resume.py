"""The start of a run: from its newest checkpoint, from given weights, or fresh; and the rows that it skips."""

import argparse
import contextlib
import io
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import storage, tracking, trained
from pipeline.config.load import flatten
from pipeline.config.location import HUB
from pipeline.config.model import LoraConfig
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizers import Tokenizer, saved_tokenizer
from pipeline.errors import CheckpointError
from pipeline.models import model_folder
from pipeline.models.adapters.folder import hash_of
from pipeline.models.adapters.lora import adapt
from pipeline.models.denoiser import Denoiser
from pipeline.models.released import conversion
from pipeline.run import Run
from pipeline.training import checkpoint, slices
from pipeline.training.checkpoint import TrainState
from pipeline.training.ema import AVERAGE, EMA, read_averages
from pipeline.training.engine import OPTIMIZER, TAG, WEIGHTS, Engine, import_deepspeed
from pipeline.training.slices import Index, fill

log = logging.getLogger(__name__)

SKIPPED = "skipped.json"
# Sections that may change between two starts of a run, except for the keys that its mathematics depend on.
FREE_SECTIONS = ("train.", "sampling.", "evaluation.", "tracking.", "cluster.")
FIXED_KEYS = {"train.batch", "train.precision", "train.class_drop", "train.init_from", "train.ema"}

_RANK = re.compile(r"zero_pp_rank_(\d+)_|_(\d{5,})\.")  # in the names of files that one rank wrote

Skipped = dict[int, list[int]]  # step -> places in its global batch


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run resumes from.

    Attributes:
        path: folder of the checkpoint.
        state: its state.
        slices: which rank stored which slices; None: an earlier version wrote it.
        universal: whether DeepSpeed reads a converted form of a checkpoint of an earlier version.
    """

    path: str
    state: TrainState
    slices: Index | None
    universal: bool

    def load(self, engine: Engine, ema: EMA, rank: int) -> None:
        """Restore model, optimiser and EMA; all ranks call it together.

        Args:
            engine: fresh.
            ema: of its weights.
            rank: of this worker.
        """
        if self.slices is not None:
            writer, folder = slices.writer(self.slices, ema.slices), self.path
            if writer is not None:  # whole files, which `agree` may have copied to this node
                folder = str(storage.fetch(self.path, needed_by(writer)))
            engine.load(folder, self.slices)
            slices.read(folder, AVERAGE, self.slices, {"": ema.slices})
            return
        own = needed_by(rank)
        local = storage.fetch(
            self.path, lambda name: checkpoint.is_average(name) or (own(name) and not self.universal)
        )
        engine.load_earlier(storage.fetch(checkpoint.universal_path(self.path)) if self.universal else local)
        fill(ema.slices, read_averages(local))


def needed_by(rank: int) -> Callable[[str], bool]:
    """Return a function that tells whether a file of a checkpoint was written by a rank, or for all.

    Args:
        rank: of a worker.
    """
    return lambda name: _writer_of(name) in (rank, None)


def _writer_of(name: str) -> int | None:
    """Return the rank that wrote a file of a checkpoint, by its name; None: all ranks read it."""
    part = _RANK.search(name)
    return int(part[1] or part[2]) if part else None


def agree(run: Run, rank: int, workers: int) -> tuple[Resume | None, Skipped]:
    """Choose where all ranks resume, and which rows they skip; all ranks call it together.

    Rank 0 chooses. Every rank compares a share of a checkpoint's files with their hashes, its own files if as many
    ranks wrote it.

    Args:
        run: that starts.
        rank: of this worker.
        workers: size of the group.

    Returns:
        Where to resume (None for a fresh start), and the rows that are skipped.

    Raises:
        CheckpointError: as `plan_resume`, on rank 0.
    """

    def damages(path: str, files: checkpoint.Files) -> list[str]:
        own = {name: facts for name, facts in files.items() if (_writer_of(name) or 0) % workers == rank}
        gathered: list[Any] = [None] * workers
        dist.all_gather_object(gathered, checkpoint.damages(path, own))
        return [flaw for part in gathered for flaw in part]

    def check(path: str) -> list[str]:
        files, flaws = checkpoint.promised(path)
        if not flaws:
            dist.broadcast_object_list([(path, files), None])
            flaws = damages(path, files)
        return flaws

    if rank == 0:
        answer: list[Any] = [None, (plan_resume(run, workers, check), read_skipped(run.folder))]
        dist.broadcast_object_list(answer)
        return answer[1]
    while True:
        message: list[Any] = [None, None]
        dist.broadcast_object_list(message)
        if message[1] is not None:
            return message[1]
        damages(*message[0])


def plan_resume(
    run: Run, workers: int, check: Callable[[str], list[str]] = checkpoint.problems
) -> Resume | None:
    """Find the run's newest usable checkpoint and make it readable for this number of workers; rank 0 calls it.

    Later checkpoints, which could not be used, are removed.

    Args:
        run: that starts.
        workers: size of the group.
        check: lists the problems of a checkpoint.

    Returns:
        Where to resume, or None for a fresh start.

    Raises:
        CheckpointError: the config differs from the checkpoint's in more than bookkeeping, the ZeRO stage
            changed in a way that DeepSpeed cannot convert, or the run has other data.
    """
    path = checkpoint.latest(run.folder, check)
    state = _usable_state(run, path)
    checkpoint.remove_after(run.folder, state.step if state else -1)
    if path is None or state is None:
        return None
    old, new = state.config["train"]["zero_stage"], run.config.train.zero_stage
    index = checkpoint.slices_of(path)
    # Stage 0 is whole on every worker; the others are cut by the number of workers and by the stage.
    universal = index is None and new > 0 and (state.workers != workers or old != new)
    if universal:
        _convert(path)
    log.info("resuming from %s", path)
    return Resume(path, state, index, universal)


def precheck(run: Run) -> None:
    """Refuse, before any worker starts, a config that the run's newest checkpoint does not fit, and damaged records.

    Args:
        run: that starts.

    Raises:
        CheckpointError: as `plan_resume`.
        DataError: a record in the run's folder is damaged.
    """
    tracking.recorded_run(run.folder)
    read_skipped(run.folder)
    newest = checkpoint.newest(run.folder)
    _usable_state(run, newest)
    source = run.config.train.init_from
    needed = newest is None or run.config.model.lora is not None  # an adapted model is read at every start
    if needed and source is not None and source.startswith(HUB):
        run.find_model("train.init_from", source)  # into the cache, or an error before any worker starts


def check_data(run: Run) -> None:
    """Refuse data that is not what the run's newest checkpoint was trained on.

    Args:
        run: that starts, with its manifest.

    Raises:
        CheckpointError: names what differs.
    """
    _usable_state(run, checkpoint.newest(run.folder))


def _usable_state(run: Run, path: str | None) -> TrainState | None:
    """Read a checkpoint's state; refuse a config, ZeRO stage or data with which the run cannot resume from it."""
    if path is None:
        return None
    state, now = checkpoint.read_state(path), run.config.train.zero_stage
    check_same(state.config, run.config, path)
    before = state.config["train"]["zero_stage"]
    if before != now and {before, now} != {1, 2}:
        raise CheckpointError(
            f"train.zero_stage: {path} was written at stage {before}, which does not convert to stage {now}; "
            f"keep stage {before}, or start a run of another name with train.init_from={path}"
        )
    data = {} if run.given_manifest is None else run.given_manifest.identity
    differing = [
        f"  {what}: {state.data[what]} -> {data[what]}"
        for what in state.data.keys() & data.keys()
        if state.data[what] != data[what]
    ]
    if differing:
        raise CheckpointError(
            f"data.source: {path} was trained on other data, so the run cannot resume from it; restore the "
            f"data, or start a run of another name with train.init_from={path}. Hashes that differ:\n"
            + "\n".join(sorted(differing))
        )
    return state


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare two configs or sections, as JSON values.

    Args:
        before: the first one.
        now: the second one.

    Returns:
        Both values of every key whose values differ, by dotted key, sorted.
    """
    old, new = flatten(dict(before)), flatten(dict(now))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def check_same(old: dict[str, Any], config: RunConfig, path: str) -> None:
    """Refuse a config with which a resumed run would be another run.

    Args:
        old: config of the run before.
        config: of the run now.
        path: what belongs to the run before, for the message.

    Raises:
        CheckpointError: lists every difference as old -> new.
    """
    # Steps say where a round ends, and the whole course of a cosine's learning rate.
    steps_matter = config.distill or config.optim.schedule == "cosine"
    fixed = FIXED_KEYS | ({"train.steps"} if steps_matter else set())
    # A key that came after the run before was started had its default then.
    stated = flatten(old).keys() | flatten(config.model_dump(mode="json", exclude_defaults=True)).keys()
    differing = [
        f"  {key}: {before!r} -> {now!r}"
        for key, (before, now) in differences(old, config.model_dump(mode="json")).items()
        if key in stated and (key in fixed or not key.startswith(FREE_SECTIONS))
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to a run with another config; only steps (not in distillation, nor with optim.schedule "
            "cosine), validation, logging and cluster keys may change. Use another name, with train.init_from to "
            "start from this run's weights, or change back:\n" + "\n".join(differing)
        )


def _convert(path: str) -> None:
    """Convert a checkpoint of an earlier version to DeepSpeed's universal form, once, whole or not at all.

    Raises:
        CheckpointError: the form cannot be made or written.
    """
    target = checkpoint.universal_path(path)
    if storage.folder_complete(target):
        return
    import_deepspeed()
    from deepspeed.checkpoint.ds_to_universal import main

    log.info("converting %s for another number of workers", path)
    quiet = io.StringIO()  # the converter prints its progress
    with tempfile.TemporaryDirectory() as temporary:
        options = argparse.Namespace(
            input_folder=str(storage.fetch(path) / TAG),
            output_folder=str(Path(temporary) / TAG),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                main(options)
            storage.publish_folder(temporary, target)
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be converted for this number of workers: {error}; "
                f"start with as many as wrote it, or a run of another name with train.init_from={path}"
            ) from error


def initial_weights(run: Run, model: Denoiser) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Put the weights of `train.init_from` into a fresh model.

    The weights of a model folder and of a released file are EMA weights; weights and average both start from them. A
    checkpoint has both.

    Args:
        run: that starts.
        model: on the CPU; its parameters are overwritten.

    Returns:
        The weights, which the model holds perhaps rounded to bf16, and the average that the EMA starts from, both in
        float32 by parameter name; None if `train.init_from` is not set.

    Raises:
        CheckpointError: no such folder or version, or it does not fit the model.
    """
    source = run.config.train.init_from
    if source is None:
        return None
    origin = f"train.init_from: {source!r}"
    local, _ = run.find_model("train.init_from", source, f"{trained.KINDS}, a checkpoint")
    if (local / checkpoint.STATE).is_file():
        if run.config.model.lora or checkpoint.read_state(str(local)).config["model"].get("lora"):
            expected = "expected a model folder or released weights"
            raise CheckpointError(
                f"{origin} is a checkpoint, and adapters are trained on whole models; {expected}"
            )
        if flaws := checkpoint.problems(str(local)):
            raise CheckpointError(f"{origin} is not usable: " + "; ".join(flaws))
        average = read_averages(local)
        weights = _raw_weights(local)
    elif local.is_file():
        weights = average = conversion.load(local)[0].state_dict()
    elif (local / model_folder.ADAPTER).is_file():
        weights = average = trained.read(local, uri=run.tracking_uri).denoiser.state_dict()
    else:
        tokenizer = saved_tokenizer(local)
        if isinstance(tokenizer, Tokenizer) and tokenizer.hash != run.manifest.tokenizer.hash:
            raise CheckpointError(
                f"{origin} has other token ids than the data (tokenizer {tokenizer.name!r}, the data's is "
                f"{run.manifest.tokenizer.name!r}); data.tokenizer={source} prepares data with the model's tokenizer"
            )
        weights = average = model_folder.read_weights(local)
    model_folder.load_weights(model, {name: v.clone() for name, v in weights.items()}, origin)
    log.info("starting from the weights of %s", source)
    return weights, average


def adapt_base(run: Run, model: Denoiser, config: LoraConfig, resume: Resume | None) -> str:
    """Read the model of `train.init_from`, freeze it, and give it trainable updates.

    Args:
        run: that starts.
        model: fresh, on the CPU.
        config: of the updates.
        resume: the checkpoint that the run resumes from, which holds the updates alone.

    Returns:
        Hash of the frozen weights.

    Raises:
        CheckpointError: as `initial_weights`; or the weights are others than those that the run began with.
    """
    initial = initial_weights(run, model)
    assert initial is not None
    base = hash_of(initial[0])
    if resume is not None and resume.state.task["base"] != base:
        source = run.config.train.init_from
        raise CheckpointError(
            f"train.init_from: {source!r} has other weights than {resume.path} was trained with"
        )
    adapt(model, config)
    return base


def _raw_weights(local: Path) -> dict[str, Tensor]:
    """Read the full float32 weights of a checkpoint of this project, of any ZeRO stage."""
    if not (local / TAG).is_dir():
        return slices.read_whole(local, OPTIMIZER, WEIGHTS)
    state = checkpoint.read_state(str(local))
    if state.config["train"]["zero_stage"] > 0:
        import_deepspeed()
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        tensors = get_fp32_state_dict_from_zero_checkpoint(str(local), tag=TAG)
        return {name: value.float() for name, value in tensors.items()}
    # A pickle of DeepSpeed that this project wrote, already checked against its SHA-256.
    saved = torch.load(local / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    weights: dict[str, Tensor] = saved["module"]
    if state.config["train"]["precision"] == "bf16":  # the optimiser's state holds the masters in this order
        masters = (value for group in saved["optimizer"]["fp32_groups"] for value in group)
        weights = dict(zip(weights, masters, strict=True))
    return {name: value.detach().float() for name, value in weights.items()}


def read_skipped(folder: str) -> Skipped:
    """Read the places in global batches that made a step not finite, by step, from a run's folder.

    Args:
        folder: of the run.

    Raises:
        DataError: the file is damaged.
    """
    return storage.read_json(
        storage.join(folder, SKIPPED),
        {},
        lambda entries: {int(step): list(map(int, entry["places"])) for step, entry in entries.items()},
    )


def add_skipped(folder: str, step: int, places: list[int], rows: list[int]) -> None:
    """Record places of a global batch that made a step not finite.

    Args:
        folder: of the run.
        step: number of updates done before it.
        places: in the global batch.
        rows: of the data at these places, for the reader of the file.
    """
    file = storage.join(folder, SKIPPED)
    entries = storage.read_json(file, {}) | {str(step): {"places": places, "rows": rows}}
    storage.publish_text(file, json.dumps(entries))
