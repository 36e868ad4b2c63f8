"""A worker that waits for ever writes down where, and ends, so that its group can start again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.schema import RunConfig
from pipeline.run import Run
from pipeline.runtime.session import HANGS, PlainSession
from pipeline.training import checkpoint
from pipeline.training.loop import train
from tests.support.observed import quick
from tests.support.workers import Workers

LIMIT = 2.0


class Freezing(PlainSession):
    """Dawdles between the second step and the third; then worker 1 stops in step 4, as if its machine did."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        super().log(metrics, step)
        if step == 2:
            time.sleep(1.5 * LIMIT)
        if step == 3 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)


def freeze(rank: int, workers: int, config: RunConfig) -> None:
    train(Run(config), Freezing(rank, workers, Run(config).folder))


def test_worker_that_waits_for_a_frozen_one_ends_and_tells_where(run_storage: Path) -> None:
    config = quick(run_storage, "hung", steps=100, checkpoint_every=2)
    config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"hang_timeout_s": LIMIT})}
    )
    group, began = Workers(2), time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank \[0\]:\nno answer"):
        group(freeze, config)
    assert time.monotonic() - began < 100
    run = Run(config).folder
    # The time between two steps did not count: validation and checkpoints may take as long as they like.
    (file,) = (Path(run) / HANGS).iterdir()
    assert file.name == "step_00000004_worker_00000.txt"
    text = file.read_text()
    assert text.startswith("worker 0: step 4 has not finished in 2 s (cluster.hang_timeout_s)")
    (main,) = (part for part in text.split("\n\n") if "training/loop.py" in part)
    assert "torch/distributed" in main or "training/engine.py" in main  # it waits for the other one
    assert text.count("Thread 0x") >= 2
    path = checkpoint.latest(run)
    assert path is not None
    assert checkpoint.read_state(path).step == 2


STUCK = """
import ctypes, sys
from pipeline.runtime.session import HangWatch
HangWatch.LAST_S = 0.5
watch = HangWatch(sys.argv[1], 0, 0.5)
watch.begin(6)
ctypes.PyDLL(None).sleep(60)  # a call of C that keeps every other thread of Python out
"""


def test_call_that_lets_no_other_thread_run_ends_too(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 1
    assert "Timeout (0:00:01)" in ended.stderr
    assert 'File "<string>", line 7' in ended.stderr
