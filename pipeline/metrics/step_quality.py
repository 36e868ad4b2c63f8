"""Quality of samples of a teacher and its students by the number of sampling steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pandas as pd

from pipeline.config.evaluation import SamplingConfig
from pipeline.data.manifest import SpecialIds
from pipeline.metrics.draw import Sampler, batches_of
from pipeline.metrics.ngram import Perplexity, Rows
from pipeline.metrics.text import unigram_entropy
from pipeline.reports.tables import markdown
from pipeline.runtime.actors import Resources, in_order, started
from pipeline.sampling.row_ends import cut_rows


@dataclass(frozen=True)
class Quality:
    """Quality of the samples of one model at one number of steps.

    Attributes:
        model: "teacher", "round 1", and so on.
        steps: number of sampling steps.
        perplexity: under a bigram model of the training rows; a low one may come from rows without diversity.
        entropy: mean over rows of the entropy of the row's own token frequencies, nats.
    """

    model: str
    steps: int
    perplexity: float
    entropy: float


def step_counts(teacher_steps: int, rounds: int, positions: int) -> list[int]:
    """List the numbers of steps that the last four of teacher and students are trained for, the fewest first.

    Args:
        teacher_steps: steps of the teacher; every round halves them.
        rounds: number of rounds.
        positions: tokens of a row that are drawn; no order takes more steps.
    """
    counts = [min(positions, teacher_steps // 2**done) for done in range(rounds + 1)]
    return sorted(set(counts[-4:]))


def measure(model: str, steps: int, rows: Rows, perplexity: Perplexity) -> Quality:
    """Measure drawn rows.

    Args:
        model: name of the model.
        steps: number of sampling steps.
        rows: without BOS.
        perplexity: from `ngram.bigram_model`.
    """
    return Quality(model, steps, perplexity([rows]), unigram_entropy(rows))


def compare(
    models: Mapping[str, str],
    counts: Sequence[int],
    settings: SamplingConfig,
    special: SpecialIds,
    perplexity: Perplexity,
    resources: Resources,
) -> list[Quality]:
    """Sample from every model at every number of steps, and measure the rows.

    Args:
        models: folders that every node can read, by name.
        counts: numbers of steps.
        settings: how to draw.
        special: ids with a meaning of their own.
        perplexity: from `ngram.bigram_model`.
        resources: of the actors that draw.
    """
    points = [(name, steps) for name in models for steps in counts]
    parts = batches_of(settings)
    tasks = [
        (models[name], settings.model_copy(update={"steps": steps}), *part)
        for name, steps in points
        for part in parts
    ]
    with started(Sampler, (resources.cpus,), resources, len(tasks)) as samplers:
        drawn = in_order(samplers, "draw", tasks)
        rows = [np.concatenate([batch.tokens for batch in islice(drawn, len(parts))]) for _ in points]
    start = int(special.bos is not None)
    return [
        measure(*point, cut_rows(tokens, special.eot, special.pad, start), perplexity)
        for point, tokens in zip(points, rows, strict=True)
    ]


def points(qualities: Sequence[Quality]) -> dict[str, list[tuple[int, float, float]]]:
    """Group qualities by model, as `figures.quality_against_steps` takes them.

    Args:
        qualities: of all models.
    """
    return {
        model: [(q.steps, q.perplexity, q.entropy) for q in qualities if q.model == model]
        for model in dict.fromkeys(q.model for q in qualities)
    }


def table(qualities: Sequence[Quality]) -> str:
    """Make a Markdown table: a row per model, a column per number of steps, each `perplexity (entropy)`.

    Args:
        qualities: of all models.
    """
    rows = []
    for model, values in points(qualities).items():
        cells = {f"{n} steps": f"{perplexity:.2f} ({entropy:.2f})" for n, perplexity, entropy in values}
        rows.append({"bigram perplexity (entropy)": model, **cells})
    return markdown(pd.DataFrame(rows))
