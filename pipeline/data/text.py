"""Text preparation: documents -> token shards and a manifest, on Ray.

Three stages, each skipping what an earlier, interrupted run has finished:
  1. Ray Data tokenises the source's units, each into one intermediate file.
  2. Prefix sums over the units' lengths give every shard its exact range of tokens; Ray tasks write them.
  3. The manifest is written and the intermediate files go.
What comes out depends on the input and the config alone.
"""

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.config.schema import RunConfig
from pipeline.data.packing import (
    SplitPlan,
    Unit,
    cached_tokenizer,
    plan_splits,
    read_unit,
    tokenise_unit,
    write_shard,
)
from pipeline.data.shards import (
    MANIFEST,
    Manifest,
    ShardFile,
    Skipped,
    SourceInfo,
    SpecialIds,
    Split,
    TokenizerInfo,
)
from pipeline.data.sources import HUB, Piece, Source, open_source
from pipeline.errors import DataError, PipelineError

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same config and input would give other shards
_WORK = "_work-"
_SHARD = re.compile(r"(train|validation)-\d{5}\.parquet")
_NAMED = 1000  # names of skipped documents that the manifest keeps


def content(config: RunConfig) -> dict[str, Any]:
    """Every setting that determines what the shards hold."""
    data = config.data
    keys = ("source", "text_field", "subset", "split", "revision", "on_error")
    shape = ("length", "wrap", "validation_documents", "shard_rows")
    values = {key: getattr(data, key) for key in keys + shape}
    return {**values, "tokenizer": cached_tokenizer(data.tokenizer).hash, "format": FORMAT}


def data_path(config: RunConfig) -> str:
    """Folder of the prepared data: `data.path`, or one named by what determines its contents."""
    data = config.data
    if data.path is not None:
        return storage.resolve(data.path)
    names = (data.source.rstrip("/*").rpartition("/")[2], Path(data.tokenizer).stem, str(data.length))
    slug = "-".join(re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") for name in names)
    return storage.join(
        storage.resolve(config.cluster.storage), "data", f"{slug}-{_key(content(config))[:10]}"
    )


def ensure(config: RunConfig) -> Manifest:
    """The manifest of the config's data, which is prepared first if it is not there.

    A local source that has changed since is a warning only: a run that goes on keeps the data it began with.

    Raises:
        DataError: the folder holds other data, or preparing failed.
    """
    path = data_path(config)
    manifest = _prepared(config, path)
    if manifest is None:
        return prepare(config)
    if storage.is_local(config.data.source) and not config.data.source.startswith(HUB):
        with contextlib.suppress(DataError):  # the source may be gone: its shards are enough
            if open_source(config.data).fingerprint != manifest.source.fingerprint:
                log.warning("%s has changed since %s was prepared from it", config.data.source, path)
    return manifest


def prepare(config: RunConfig) -> Manifest:
    """Make the shards of `config.data`, or finish them where an interrupted run stopped.

    Raises:
        DataError: the source is empty, unreadable or changed; the folder holds other data.
        ConfigError: the folder cannot be written; no such tokenizer.
    """
    data, path = config.data, data_path(config)
    tokenizer = cached_tokenizer(data.tokenizer)
    manifest = _prepared(config, path)
    source = open_source(data)
    if manifest is not None:
        if manifest.source.fingerprint != source.fingerprint:
            raise DataError(
                f"data.source: {data.source!r} is not what it was when {path} was prepared from it; "
                "remove that folder to prepare it again, or set data.path to another one"
            )
        log.info("%s is already prepared", path)
        _clean(path, manifest)
        return manifest
    storage.check_writable(path, "cluster.storage" if data.path is None else "data.path")
    plan = _key({"content": content(config), "units": [[asdict(p) for p in unit] for unit in source.units]})
    work = storage.join(path, f"{_WORK}{plan[:16]}")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    log.info("preparing %s in %s", data.source, path)
    units = _tokenise(source, data, work)
    splits = _build(plan_splits(units, data, tokenizer, work), units, path, work)
    manifest = Manifest(
        length=data.length,
        vocabulary=tokenizer.vocab_size,
        special=SpecialIds(eot=tokenizer.eot, bos=tokenizer.eot if data.wrap == "bos_eos" else None),
        wrap=data.wrap,
        tokenizer=TokenizerInfo(name=tokenizer.name, hash=tokenizer.hash),
        source=SourceInfo(name=data.source, revision=source.revision, fingerprint=source.fingerprint),
        content=content(config),
        content_key=_key(content(config)),
        splits=splits,
        documents=sum(unit.documents for unit in units),
        documents_empty=sum(unit.empty for unit in units),
        tokens=sum(unit.tokens for unit in units),
        skipped=Skipped(
            count=sum(len(unit.problems) for unit in units),
            names=tuple(name for unit in units for name in unit.problems)[:_NAMED],
        ),
    )
    _finish(path, manifest)
    return manifest


def _prepared(config: RunConfig, path: str) -> Manifest | None:
    """The manifest in `path` if it is this config's, None if there is none yet."""
    names = storage.listing(path)
    if MANIFEST not in names:
        if names and not any(name.startswith(_WORK) for name in names):
            raise DataError(
                f"data.path: {path!r} holds other files, such as {names[0]!r}; expected a new or empty folder"
            )
        return None
    manifest = Manifest.read(path)
    wanted = content(config)
    found = [
        f"{key}: the data has {manifest.content.get(key)!r}, the config {wanted.get(key)!r}"
        for key in {**wanted, **manifest.content}
        if manifest.content.get(key) != wanted.get(key)
    ]
    if found:
        raise DataError(
            f"data.path: {path!r} holds data of another config; set another path, or remove the folder:\n"
            + "\n".join(f"  data.{line}" for line in found)
        )
    return manifest


def _tokenise(source: Source, data: TextDataConfig, work: str) -> list[Unit]:
    """Stage 1: every unit's tokens in `work`, and their counts."""
    there = set(storage.listing(work))
    done = [read_unit(work, index) for index in range(len(source.units)) if f"unit-{index:06d}.json" in there]
    if done:
        log.info("%d of %d units were tokenised before", len(done), len(source.units))
    finished = {unit.index for unit in done}
    todo = [
        {"index": index, "pieces": json.dumps([asdict(piece) for piece in pieces])}
        for index, pieces in enumerate(source.units)
        if index not in finished
    ]
    progress = _Progress("tokenised", "units", len(todo))
    for unit in _run_units(todo, data, work):
        if unit.fatal:
            raise DataError(unit.fatal)
        done.append(unit)
        progress.add(unit.tokens)
    for problem in (problem for unit in done for problem in unit.problems):
        log.warning("skipped %s", problem)
    return sorted(done, key=lambda unit: unit.index)


def _run_units(todo: list[dict[str, Any]], data: TextDataConfig, work: str) -> Iterator[Unit]:
    """Run the units through Ray Data, yielding results as they come."""
    if not todo:
        return
    items = ray.data.from_items(todo, override_num_blocks=len(todo))
    units = items.map(partial(_tokenise_row, data=data, work=work))
    units.context.enable_progress_bars = units.context.print_on_execution_start = False  # we log our own
    for row in units.iter_rows():
        yield Unit(**json.loads(row["unit"]))


def _tokenise_row(row: dict[str, Any], data: TextDataConfig, work: str) -> dict[str, Any]:
    """Ray Data's map function. JSON, so that no column's type depends on what a unit happened to hold."""
    index, pieces = int(row["index"]), [Piece(**piece) for piece in json.loads(row["pieces"])]
    try:
        unit = tokenise_unit(index, pieces, data, work)
    except PipelineError as error:  # as a result, since Ray would wrap it in a page of traceback
        unit = Unit(index, fatal=str(error))
    return {"unit": json.dumps(asdict(unit))}


def _build(plans: dict[str, SplitPlan], units: list[Unit], path: str, work: str) -> dict[str, Split]:
    """Stage 2: every shard of every split, each written by a Ray task."""
    write = ray.remote(num_cpus=1)(write_shard)
    starts = ray.put(np.cumsum([0, *(unit.tokens for unit in units)]))
    shards = {
        write.remote(shard, starts, path, work): shard for plan in plans.values() for shard in plan.shards
    }
    progress = _Progress("wrote", "shards", len(shards))
    waiting = list(shards)
    files: dict[str, ShardFile] = {}
    while waiting:
        done, waiting = ray.wait(waiting)
        shard = shards[done[0]]
        try:
            files[shard.name] = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, PipelineError) else error from None
        progress.add(shard.stop - shard.start)
    return {
        split: Split(
            files=tuple(files[shard.name] for shard in plan.shards),
            documents=plan.documents,
            tokens=plan.tokens,
            tokens_dropped=plan.tokens % plan.shards[0].payload,
        )
        for split, plan in plans.items()
    }


def _finish(path: str, manifest: Manifest) -> None:
    """Stage 3: the manifest, which makes the folder complete."""
    storage.publish_text(storage.join(path, MANIFEST), manifest.model_dump_json(indent=2) + "\n")
    _clean(path, manifest)
    _report(path, manifest)


def _clean(path: str, manifest: Manifest) -> None:
    """Remove intermediate files, unfinished ones, and shards of an interrupted run on another input."""
    known = {file.name for split in manifest.splits.values() for file in split.files}
    for name in storage.listing(path):
        if name.startswith(_WORK) or (_SHARD.fullmatch(name) and name not in known):
            storage.remove(storage.join(path, name))
    storage.sweep(path)


def _report(path: str, manifest: Manifest) -> None:
    log.info(
        "prepared %s: %d documents, %d tokens, %d training and %d validation rows of %d, %d tokens dropped, "
        "%d documents skipped, %d empty ones left out",
        path,
        manifest.documents,
        manifest.tokens,
        manifest.rows("train"),
        manifest.rows("validation"),
        manifest.length,
        sum(split.tokens_dropped for split in manifest.splits.values()),
        manifest.skipped.count,
        manifest.documents_empty,
    )


class _Progress:
    """A log line now and then: how many of how many, tokens/s, time left."""

    def __init__(self, verb: str, what: str, total: int, interval: float = 5.0) -> None:
        self._verb, self._what, self._total, self._interval = verb, what, total, interval
        self._count = self._tokens = 0
        self._begin = self._shown = time.monotonic()

    def add(self, tokens: int) -> None:
        self._count += 1
        self._tokens += tokens
        now = time.monotonic()
        if now - self._shown < self._interval and self._count < self._total:
            return
        self._shown = now
        seconds = max(now - self._begin, 1e-9)
        log.info(
            "%s %d of %d %s, %d tokens, %.0f tokens/s, %.0f s left",
            self._verb,
            self._count,
            self._total,
            self._what,
            self._tokens,
            self._tokens / seconds,
            seconds / self._count * (self._total - self._count),
        )


def _key(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
