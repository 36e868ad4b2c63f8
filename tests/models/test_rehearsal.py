"""Training steps and sampling on a GPU without values: devices, precisions, and where the host waits."""

import json
from typing import Any

import pytest
import torch

from pipeline.config.schema import DiffusionConfig, TrainConfig
from pipeline.diffusion import partition
from pipeline.planning import step_time
from tests.support import rehearsal
from tests.support.fake_gpu import run_with_device

Report = dict[str, list[str]]
TRAINING = {
    "products": ["bfloat16"],
    "attention": ["bfloat16"],
    "softmax": ["float32"],  # of the loss
    "statistics": ["float32"],  # of norms
    "row sums": ["float64"],
    "draws": [],
    "mixed": [],
    "waits": [],
}
SAMPLING = TRAINING | {"softmax": [], "row sums": [], "draws": ["float64"]}
EXPECTED = {
    "training PGM": TRAINING,
    "training causal PGM": TRAINING,
    "training MDLM": TRAINING,
    "training AR": TRAINING,
    "training images": TRAINING,
    "training distillation": TRAINING | {"draws": ["float64"]},
    "sampling PGM": SAMPLING,
    "sampling PGM, stored keys": SAMPLING,
    "sampling causal PGM": SAMPLING,
    "sampling MDLM": SAMPLING,
    "benchmark": TRAINING,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with a device without values finds."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has real CUDA devices")
    return json.loads(run_with_device(rehearsal.__name__, tmp_path_factory.mktemp("device")))


@pytest.fixture(scope="module")
def reports(found: dict[str, Any]) -> dict[str, Report]:
    """Reports of all cases."""
    return found["reports"]


@pytest.mark.parametrize("case", EXPECTED)
def test_devices_precisions_and_waits(case: str, reports: dict[str, Report]) -> None:
    assert reports[case] == EXPECTED[case]


def test_the_report_names_every_fault(reports: dict[str, Report]) -> None:
    assert {*reports} - {*EXPECTED} == {"faults"}
    faults = reports["faults"]
    for kind in ("products", "attention", "draws", "row sums"):
        assert faults[kind] == ["float32"], kind
    assert faults["softmax"] == ["bfloat16"]
    assert faults["statistics"] == ["float64"]
    assert [line.partition(":")[0] for line in faults["mixed"]] == ["index"]
    waits = {line.partition(":")[0] for line in faults["waits"]}
    assert waits == {"index", "_local_scalar_dense", "_to_copy between host and device"}


@pytest.mark.parametrize("name", rehearsal.COUNTED)
def test_predicted_launches_and_bytes(name: str, found: dict[str, Any]) -> None:
    """What `plan` predicts times from, against the kernels of the code as it is."""
    config, rows, length, vocabulary = rehearsal.COUNTED[name]
    diffusion = DiffusionConfig(schedule="arccos" if config.classes else "loglinear")
    groups = partition.draw(diffusion, seed=0, step=0, shape=(rows, length), bos=True).groups
    predicted = step_time.count(config, vocabulary, groups, TrainConfig())(rows)
    assert predicted.launches == pytest.approx(found["counts"][name]["launches"], rel=0.02)
    assert predicted.moved == pytest.approx(found["counts"][name]["moved"], rel=0.05)
