"""The speed of training as metrics."""

from pathlib import Path

import pytest
import torch

from pipeline.data.manifest import Manifest
from pipeline.models.model_folder import DataFacts
from pipeline.planning.gpus import GPUS
from pipeline.planning.plan import forward_flops, step_flops
from pipeline.run import Run
from pipeline.training.throughput import Throughput
from tests.support.data_helpers import sentences
from tests.support.observed import quick


def test_rates_and_the_share_of_the_peak(run_storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of 8 rows of 16 tokens in two seconds; what is computed again does not count."""
    config = quick(run_storage, "speed", activation_checkpointing=True)
    run = Run(config, given_manifest=Manifest.read(Run(config).data_path))
    told = Throughput(run, 2, torch.device("cpu")).metrics(4, 2.0)
    forward = forward_flops(config, DataFacts(257, 16, run.manifest.special.bos, 256))
    assert told == {
        "train/rows_per_second": 16.0,
        "train/tokens_per_second": 256.0,
        "train/teraflops": pytest.approx(16 * 3 * forward / 1e12),
    }
    assert step_flops(config, DataFacts(257, 16, run.manifest.special.bos, 256)) == pytest.approx(
        8 * 4 * forward
    )

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    told = Throughput(run, 2, torch.device("cuda")).metrics(4, 2.0)
    assert told["train/mfu"] == pytest.approx(told["train/teraflops"] / (2 * GPUS["h100"].fp32))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert "train/mfu" not in Throughput(run, 2, torch.device("cuda")).metrics(4, 2.0)


def test_padding_is_no_token(run_storage: Path) -> None:
    run = Run(sentences(quick(run_storage, "speed"))).with_data()
    rows = run.manifest
    told = Throughput(run, 1, torch.device("cpu")).metrics(1, 1.0)
    split = rows.split("train")
    mean = split.tokens / sum(file.rows for file in split.files)
    assert 1 < mean < rows.length
    assert told["train/tokens_per_second"] == pytest.approx(8 * mean)
