"""How good a teacher's and its students' samples are, by the number of sampling steps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import ray
import torch
from jaxtyping import Integer

from pipeline import storage
from pipeline.config.schema import SamplingConfig
from pipeline.metrics.draw import labels_of
from pipeline.metrics.text import unigram_entropy
from pipeline.models import model_folder
from pipeline.models.denoiser import DTYPES, Denoiser
from pipeline.runtime.actors import own_device
from pipeline.sampling.sampler import SamplingRequest, sample

Rows = Integer[np.ndarray, "n L"]
Judge = Callable[[Iterable[Rows]], float]


@dataclass(frozen=True)
class Quality:
    """Samples of one model at one number of steps.

    Attributes:
        model: "teacher", "round 1", and so on.
        perplexity: under a bigram model of the training rows; low ones may come from rows without variety.
        entropy: mean over rows of the entropy of the row's own token frequencies, nats.
    """

    model: str
    steps: int
    perplexity: float
    entropy: float


def step_counts(teacher_steps: int, rounds: int, positions: int) -> list[int]:
    """Steps that the last four models of teacher and students are made for, the fewest first.

    Args:
        positions: tokens of a row that are drawn; no order takes more steps.
    """
    made_for = [min(positions, teacher_steps // 2**done) for done in range(rounds + 1)]
    return sorted(set(made_for[-4:]))


def draw(model: Denoiser, bos: int | None, settings: SamplingConfig, steps: int) -> Rows:
    """`settings.num_samples` rows as `settings` draws them, in so many steps, without BOS."""
    classes = None if model.classes is None else model.classes.num_embeddings - 1
    drawn = []
    for first in range(0, settings.num_samples, settings.batch):
        count = min(settings.batch, settings.num_samples - first)
        labels = None if classes is None else labels_of(settings, classes, first, count)
        request = replace(
            SamplingRequest.of(settings, bos),
            num_samples=count,
            steps=steps,
            indices=range(first, first + count),
            condition=None if labels is None else torch.tensor(labels),
            refresh_every=1,
        )
        drawn.append(sample(model, request).cpu().numpy()[:, int(bos is not None) :])
    return np.concatenate(drawn)


def judge(model: str, steps: int, rows: Rows, perplexity: Judge) -> Quality:
    """Measure drawn rows."""
    return Quality(model, steps, perplexity([rows]), unigram_entropy(rows))


def compare(
    models: Mapping[str, str],
    counts: Sequence[int],
    settings: SamplingConfig,
    perplexity: Judge,
    cpus: int,
    use_gpu: bool,
) -> list[Quality]:
    """Every model at every number of steps, as many at the same time as the cluster holds.

    Args:
        models: folders that every node can read, by name.
        cpus: of one that draws.
    """
    remote = ray.remote(_draw_from).options(num_cpus=cpus, num_gpus=int(use_gpu))
    asked = [(name, steps) for name in models for steps in counts]
    drawn = ray.get([remote.remote(models[name], settings, steps, cpus) for name, steps in asked])
    return [judge(*key, rows, perplexity) for key, rows in zip(asked, drawn, strict=True)]


def _draw_from(path: str, settings: SamplingConfig, steps: int, threads: int) -> Rows:
    torch.set_num_threads(threads)
    model, _, facts = model_folder.read(storage.fetch(path))
    return draw(model.to(own_device(), DTYPES[settings.precision]), facts.bos, settings, steps)


def points(found: Sequence[Quality]) -> dict[str, list[tuple[int, float, float]]]:
    """What was found as `figures.quality_against_steps` takes it."""
    return {
        model: [(q.steps, q.perplexity, q.entropy) for q in found if q.model == model]
        for model in dict.fromkeys(one.model for one in found)
    }


def table(found: Sequence[Quality]) -> str:
    """Markdown: a row a model, a column a number of steps, each `perplexity (entropy)`."""
    counts = sorted({one.steps for one in found})
    lines = ["| bigram perplexity (entropy) | " + " | ".join(f"{n} steps" for n in counts) + " |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for model, measured in points(found).items():
        cells = {steps: f"{perplexity:.2f} ({entropy:.2f})" for steps, perplexity, entropy in measured}
        lines.append(f"| {model} | " + " | ".join(cells[n] for n in counts) + " |")
    return "\n".join(lines)
