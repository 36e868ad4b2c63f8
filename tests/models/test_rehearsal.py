"""Training steps and sampling on a GPU without values: devices, precisions, and where the host waits."""

import json

import pytest
import torch

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
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Reports of all cases, from a process that has a device without values."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has real CUDA devices")
    return json.loads(run_with_device(rehearsal.__name__, tmp_path_factory.mktemp("device")))


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
