"""Text preparation: documents -> token shards, on Ray.

Two stages, each skipping what an earlier, interrupted run has finished:
  1. Ray Data tokenises the source's units, each into one intermediate file.
  2. Prefix sums over the units' lengths give every shard its exact range of tokens; Ray tasks write them.
What comes out depends on the input and the config alone.
"""

import json
import logging
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import SpecialIds, Split, TokenizerInfo
from pipeline.data.prepare.packing import (
    Unit,
    cached_tokenizer,
    plan_splits,
    read_unit,
    tokenise_unit,
    write_shard,
)
from pipeline.data.prepare.text_sources import Piece, Source
from pipeline.data.prepare.workflow import PreparationResult, Progress, run_shards, run_units
from pipeline.errors import DataError, PipelineError

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same config and input would give other shards


def content(data: TextDataConfig) -> dict[str, Any]:
    """Every setting that determines what the shards hold."""
    keys = ("source", "text_field", "subset", "split", "revision", "on_error")
    shape = ("length", "wrap", "validation_documents", "shard_rows")
    values = {key: getattr(data, key) for key in keys + shape}
    return {**values, "tokenizer": cached_tokenizer(data.tokenizer).hash, "format": FORMAT}


def build(data: TextDataConfig, source: Source, path: str, work: str) -> PreparationResult:
    """Make the shards of `data`, or those that an interrupted run did not.

    Args:
        path: folder of the shards.
        work: folder of intermediate files.

    Raises:
        DataError: the source is empty or unreadable.
    """
    tokenizer = cached_tokenizer(data.tokenizer)
    units = _tokenise(source, data, work)
    plans = plan_splits(units, data, tokenizer, work)
    starts = np.cumsum([0, *(unit.tokens for unit in units)])
    shards = [shard for plan in plans.values() for shard in plan.shards]
    files = run_shards(shards, write_shard, starts, path, work, "tokens")
    return PreparationResult(
        vocabulary=tokenizer.vocab_size,
        special=SpecialIds(eot=tokenizer.eot, bos=tokenizer.eot if data.wrap == "bos_eos" else None),
        wrap=data.wrap,
        tokenizer=TokenizerInfo(name=tokenizer.name, hash=tokenizer.hash),
        splits={
            split: Split(
                files=tuple(files[shard.name] for shard in plan.shards),
                documents=plan.documents,
                tokens=plan.tokens,
                tokens_dropped=plan.tokens % plan.shards[0].payload,
            )
            for split, plan in plans.items()
        },
        documents=sum(unit.documents for unit in units),
        empty=sum(unit.empty for unit in units),
        tokens=sum(unit.tokens for unit in units),
        problems=tuple(name for unit in units for name in unit.problems),
    )


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
    progress = Progress("tokenised", "units", len(todo), "tokens")
    tokenise = partial(_tokenise_row, data=data, work=work)
    for record in run_units(todo, lambda units: units.map(tokenise)):
        unit = Unit(**record)
        if unit.fatal:
            raise DataError(unit.fatal)
        done.append(unit)
        progress.add(unit.tokens)
    for problem in (problem for unit in done for problem in unit.problems):
        log.warning("skipped %s", problem)
    return sorted(done, key=lambda unit: unit.index)


def _tokenise_row(row: dict[str, Any], data: TextDataConfig, work: str) -> dict[str, Any]:
    """Ray Data's map function. JSON, so that no column's type depends on what a unit happened to hold."""
    index, pieces = int(row["index"]), [Piece(**piece) for piece in json.loads(row["pieces"])]
    try:
        unit = tokenise_unit(index, pieces, data, work)
    except PipelineError as error:  # as a result, since Ray would wrap it in a page of traceback
        unit = Unit(index, fatal=str(error))
    return {"record": json.dumps(asdict(unit))}
