"""Compiled blocks against eager ones, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.models.blocks import Block, EncoderReader
from tests.support import compiled_blocks
from tests.support.small_models import PGM, randomised

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones() -> None:
    """Losses and gradients with equal dropout. Dropout of compiled code is a function of the seed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", compiled_blocks.__name__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["graph breaks"] == 0
    assert report["text"] < 2e-4
    assert report["images"] < 2e-4
    assert report["again"] == 0
    assert report["other seed"] > 1e-2
    assert report["recomputed"] < 1e-6


def test_all_blocks_are_told_to_compile() -> None:
    model = randomised(PGM)
    parts = [module for module in model.modules() if isinstance(module, Block | EncoderReader)]
    assert len(parts) == 5
    assert not any(part.compiled for part in parts)
    model.compile_blocks()
    assert all(part.compiled for part in parts)
