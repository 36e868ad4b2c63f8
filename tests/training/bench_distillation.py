"""What an update of distillation costs, against the naive form: run as a script, not as a test.

    python tests/training/bench_distillation.py

The naive form takes two full-length passes of the teacher that predict everything, and a full-length pass of the
student. Medians of several turns, one thread.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.model import PGMConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion import partition
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import DistillTargets, divergence
from pipeline.sampling.logits import draw_tokens
from pipeline.training.distillation import Form, hidden_sides, teach

V, L, ROWS, DT, EPS, TURNS = 8192, 256, 16, 1 / 256, 1e-3, 5
MODEL = PGMConfig(hidden=128, heads=4, encoder_blocks=4, decoder_blocks=4, dropout=0)
CPU = torch.device("cpu")


class Plain(nn.Module):
    """A head for vectors that are logits already."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def model(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    built = build(MODEL, V, L)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


TEACHER, STUDENT = model(0).eval().requires_grad_(False), model(1)


class Rows:
    """A batch's random numbers, the same for every form."""

    def __init__(self, seed: int, form: Form):
        self.tokens = np.random.default_rng(seed).integers(V, size=(ROWS, L))
        draws = partition.draw(
            DiffusionConfig(eps=EPS), seed=seed, step=0, shape=(ROWS, L), bos=False, least=2 * DT
        )
        self.t, self.groups = draws
        self.sides = hidden_sides(draws, DT, form, EPS, False)
        self.noise = np.random.default_rng([seed, 2]).random((ROWS, 2, 2, L))

    def batch(self, targets: np.ndarray, distill_targets: DistillTargets | None = None) -> Batch:
        weights = np.full(targets.shape, 1 / targets.sum())
        batch = Batch.of_arrays(self.tokens, self.groups, targets, weights, device=CPU)
        return replace(batch, distill_targets=distill_targets)


def lesson(rows: Rows) -> DistillTargets:
    """The teacher's vectors, as training takes them."""
    return DistillTargets(teach(TEACHER, rows.tokens, rows.sides, rows.noise, DT), TEACHER.head, "reverse_kl")


def teacher_part(rows: Rows) -> None:
    """With the logits of all targets, a chunk at a time, which the loss makes in both of its passes."""
    told = lesson(rows)
    for _ in range(2):
        for chunk in told.hidden.split(512):
            told.head(chunk).log_softmax(-1)


def update(rows: Rows) -> None:
    targets = rows.sides.hidden.any(1)
    STUDENT(rows.batch(targets, lesson(rows))).sum().backward()


@torch.no_grad()
def naive_teacher_part(rows: Rows) -> Tensor:
    """Log-probabilities [Q, V] of group 1: two training-mode passes over all positions, all hidden ones drawn."""
    every, found = np.ones_like(rows.groups), []
    hidden, canvas = torch.from_numpy(rows.groups), torch.from_numpy(rows.tokens)
    uniforms, noise = (torch.from_numpy(rows.noise[:, 0, which]) for which in range(2))
    first = hidden & (uniforms < torch.from_numpy(DT / rows.t)[:, None])
    unknown = hidden
    for step in range(2):
        batch = Batch.of_arrays(canvas.numpy(), unknown.numpy(), every, every / 1.0, device=CPU)
        packed = TEACHER.target_vectors(batch)
        vectors = torch.empty_like(packed)
        vectors[batch.target_index] = packed
        found.append(TEACHER.head(vectors[hidden.flatten()]).log_softmax(-1))
        if step == 0:
            drawn = draw_tokens(Plain(V), found[0], noise[hidden]).tokens  # type: ignore[arg-type]
            canvas = torch.where(first, canvas.masked_scatter(hidden, drawn), canvas)
            unknown = hidden & ~first
    return torch.where(first[hidden][:, None], *found)


def naive_update(rows: Rows) -> None:
    """The student computes all positions too, of which group 1 counts."""
    told = naive_teacher_part(rows)
    batch = rows.batch(np.ones_like(rows.groups))
    vectors = STUDENT.target_vectors(batch)
    asked = vectors[torch.from_numpy(rows.groups).flatten()[batch.target_index]]
    divergence(STUDENT.head(asked), told, "reverse_kl").mean().backward()


def seconds(forms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median of several turns, all forms once a turn."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(TURNS + 1):
        for name, run in forms.items():
            began = time.process_time()
            run()
            if turn:  # the first warms up
                found[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    compatible, complementary = Rows(0, "compatible"), Rows(0, "complementary")
    took = seconds(
        {
            "teacher, naive": lambda: naive_teacher_part(compatible),
            "teacher, compatible": lambda: teacher_part(compatible),
            "teacher, complementary": lambda: teacher_part(complementary),
            "update, naive": lambda: naive_update(compatible),
            "update, compatible": lambda: update(compatible),
            "update, complementary": lambda: update(complementary),
        }
    )
    for name, median in took.items():
        naive = took[name.split(",")[0] + ", naive"]
        print(f"{name:<24} {median:6.2f} s  {median / naive:5.2f} of naive")
