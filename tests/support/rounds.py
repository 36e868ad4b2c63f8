"""Work that several processes begin at the same time, round after round."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any


def at_once(work: Callable[[Any], Any], rounds: Sequence[Any], count: int) -> list[list[Any]]:
    """Let `count` processes call `work(round)` at the same time, for one round after the other.

    Args:
        work: of a module that is quick to import.

    Returns:
        By round, the results of all processes; of a call that raised, the traceback.
    """
    context = multiprocessing.get_context("spawn")
    meet, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_run, args=(work, rounds, meet, results)) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=120) for _ in range(count * len(rounds))]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [[result for number, result in found if number == index] for index in range(len(rounds))]


def _run(work: Callable[[Any], Any], rounds: Sequence[Any], meet: Barrier, results: "Queue[Any]") -> None:
    for number, item in enumerate(rounds):
        meet.wait(100)
        try:
            result = work(item)
        except Exception:
            result = traceback.format_exc()
        results.put((number, result))


def fetched(task: tuple[str, str]) -> str:
    """Fetch a remote folder into a node's folder; the text of its file `a.txt`."""
    folder, os.environ["TMPDIR"] = task
    from pipeline import storage

    return (storage.fetch(folder) / "a.txt").read_text()


def claimed(task: tuple[str, bool]) -> tuple[float, float] | str:
    """Hold a folder for a moment; when that began and ended, or the refusal."""
    from pipeline.errors import ConfigError
    from pipeline.runtime import claims

    claims.POLL_S = 0.05
    folder, wait = task
    try:
        with claims.held(folder, "cluster.storage", "run 'a'", "trained", wait):
            began = time.monotonic()
            time.sleep(0.1 if wait else 1.0)
            return began, time.monotonic()
    except ConfigError as error:
        return str(error)


def opened(task: tuple[str, str]) -> tuple[str, int]:
    """Open an MLflow run and log its data; its id and the number of its inputs."""
    uri, digest = task
    from pipeline.tracking import log_dataset, open_run
    from pipeline.tracking.runs import connect

    run_id = open_run(uri, "tests", "a", {"key": 1}, {})
    log_dataset(uri, run_id, digest, "/data/pydoc", {})
    return run_id, len(connect(uri).get_run(run_id).inputs.dataset_inputs)
