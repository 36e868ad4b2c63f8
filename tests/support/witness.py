"""Writes down what the workers of a job really train on."""

import hashlib
import json
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerCallback

FOLDER = "WITNESS_FOLDER"  # environment variable: where
SLOW = "slow"  # while this file is there, a step takes at least SECONDS
SECONDS = 0.5


class Witness(WorkerCallback):
    """Installed in all workers of a job whose environment has RAY_TRAIN_CALLBACKS=tests.support.witness.Witness."""

    def __init__(self) -> None:
        self._folder = os.environ[FOLDER]

    def after_init_train_context(self) -> None:
        install(Path(self._folder))


def install(folder: Path) -> None:
    """Have the training loop's batches pass through here."""
    from pipeline.training import loop

    original = loop.batches

    def batches(
        reader: Any, order: Any, start: int, rank: int, workers: int, micro: int, prepare: Any
    ) -> Generator[Any, None, None]:
        file = folder / f"{os.getpid()}-from-{start}-{rank}-of-{workers}.jsonl"
        with file.open("a", buffering=1) as out:
            prepared = original(reader, order, start, rank, workers, micro, prepare)
            for step, micros in enumerate(prepared, start):
                rows = {
                    int(place): hashlib.sha256(row.tobytes()).hexdigest()
                    for part in micros
                    for place, row in zip(part.index, part.batch.tokens.numpy(), strict=True)
                    if place >= 0
                }
                out.write(json.dumps([step, rows]) + "\n")
                if (folder / SLOW).exists():
                    time.sleep(SECONDS)
                yield micros

    loop.batches = batches


def seen(folder: Path) -> dict[int, dict[int, str]]:
    """Step -> place in its batch -> hash of the row there; a step that was done again must have had the same."""
    steps: dict[int, dict[int, str]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        lines = file.read_text().splitlines(keepends=True)
        for line in lines if lines[-1].endswith("\n") else lines[:-1]:  # a killed worker's last line
            step, rows = json.loads(line)
            for place, digest in rows.items():
                assert steps.setdefault(step, {}).setdefault(int(place), digest) == digest, (step, place)
    return steps
