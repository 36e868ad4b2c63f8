"""lm-evaluation-harness on the text quickstart: it finds a true continuation among others better than by chance."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.load import load
from pipeline.data.manifest import Manifest
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.run import Run
from tests.support.harness_task import write_task
from tests.support.launched import ROOT, LaunchedJob

QUESTIONS, CHOICES = 400, 4


@pytest.mark.alone
def test_accuracy_of_the_quickstart(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    words = [f"cluster.storage={tmp_path / 'runs'}", "data.tokenizer=bytes"]
    file = ROOT / "configs" / "text" / "quickstart.yaml"
    with LaunchedJob("pretrain", file, tmp_path, *words) as job:
        job.finish(500)

    # Held-out rows: the first 48 bytes ask, the next few of this row and of three others answer. Few, since what
    # lies further on is told by the context less than by how common it is.
    path = Run(load(file, words)).data_path
    reader = ShardReader(path, Manifest.read(path), "validation")
    rng, decode, questions = np.random.default_rng(0), ByteTokenizer().decode, []
    rows = rng.permutation(len(reader))
    for number in range(QUESTIONS):
        chosen = [rows[number], *rng.choice(rows[QUESTIONS:], CHOICES - 1, replace=False)]
        parts = reader.rows(np.array(chosen))
        order = rng.permutation(CHOICES)
        choices = [decode(parts[i, 48:54]) for i in order]
        label = int(np.flatnonzero(order == 0)[0])
        questions.append({"context": decode(parts[0, :48]), "choices": choices, "label": label})
    write_task(tmp_path / "task", questions)

    command = [sys.executable, "-m", "jobs.harness", "--model", "pgm", "--tasks", "continuation"]
    command += [
        "--model_args",
        f"path={tmp_path}/runs/quickstart/model",
        "--include_path",
        f"{tmp_path}/task",
    ]
    command += ["--output_path", f"{tmp_path}/out"]
    offline = {"HF_HOME": f"{tmp_path}/hf", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("results*.json")
    share = json.loads(found.read_text())["results"]["continuation"]["acc,none"]

    # So many right answers by guessing have a chance below one in a thousand.
    right = round(share * QUESTIONS)
    ways = [math.comb(QUESTIONS, k) * 3 ** (QUESTIONS - k) for k in range(right, QUESTIONS + 1)]
    assert sum(ways) / 4**QUESTIONS < 1e-3, share
