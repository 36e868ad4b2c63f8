"""The loss never holds B x L x V logits: peak memory of a training step, in processes of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = """
import sys
import torch
import torch.nn.functional as F
from pipeline.config.model import PGMConfig
from pipeline.models import build
from pipeline.models.batch import Batch

ROWS, LENGTH, V = 4, 1024, 50257


def kib(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


torch.set_num_threads(1)
torch.manual_seed(0)
model = build(PGMConfig(hidden=256, heads=4, encoder_blocks=1, decoder_blocks=1, dropout=0), V, LENGTH)
tokens = torch.randint(V, (ROWS, LENGTH))
groups = torch.rand(ROWS, LENGTH) < 0.5
batch = Batch(tokens, groups, torch.ones_like(groups), torch.full((ROWS, LENGTH), 1 / (ROWS * LENGTH)))
before = kib("VmRSS")
if sys.argv[1] == "logits":
    logits = model.head(model.target_vectors(batch))
    loss = F.cross_entropy(logits, tokens.flatten()[batch.target_index])
else:
    loss = model(batch).sum()
loss.backward()
print(kib("VmHWM") - before, loss.item(), model.head.weight.grad.norm().item())
"""


def step(form: str) -> tuple[float, float, float]:
    """(peak growth in MiB, loss, gradient norm) of one forward and backward pass in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, form], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    peak, loss, norm = map(float, done.stdout.split())
    return peak / 1024, loss, norm


@pytest.mark.slow
def test_peak_memory_of_a_training_step() -> None:
    chunked, loss, norm = step("chunked")
    materialised, expected_loss, expected_norm = step("logits")
    assert loss == pytest.approx(expected_loss, abs=1e-4)
    assert norm == pytest.approx(expected_norm, rel=1e-3)
    logits = 4 * 1024 * 50257 * 4 / 2**20
    assert materialised > 2 * logits, "the logits and their gradient"
    assert chunked < logits, f"{chunked:.0f} MiB: the logits existed at once"
    assert chunked <= 0.6 * materialised, f"{chunked:.0f} MiB, with logits {materialised:.0f} MiB"
