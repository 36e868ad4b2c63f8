"""Samples of teacher and students by the number of steps: what is measured, tabled and drawn."""

import numpy as np
import pytest
import torch

from pipeline.config.evaluation import SamplingConfig
from pipeline.config.model import PGMConfig
from pipeline.metrics import step_quality
from pipeline.metrics.draw import batches_of, draw_rows
from pipeline.metrics.ngram import bigram_model, bigram_perplexity
from pipeline.metrics.step_quality import Quality, measure, step_counts
from pipeline.metrics.text import unigram_entropy
from pipeline.models import build
from pipeline.models.denoiser import Denoiser
from pipeline.models.model_folder import DataFacts
from pipeline.reports.figures import quality_against_steps
from tests.support.known_source import Known, markov
from tests.support.small_models import shake

V, L = 4, 5
SETTINGS = SamplingConfig(num_samples=1000, batch=300, seed=1)
FOUND = [
    Quality("teacher", 8, 20.5, 2.5),
    Quality("teacher", 16, 12.0, 2.25),
    Quality("round 1", 8, 15.0, 2.75),
    Quality("round 1", 16, 14.0, 2.125),
]


def draw(model: Denoiser, bos: int | None, settings: SamplingConfig, steps: int) -> np.ndarray:
    """All rows of the settings, in so many steps, without BOS."""
    settings = settings.model_copy(update={"steps": steps})
    facts = DataFacts(V, model.length, bos, None)
    rows = [draw_rows(model, settings, facts, batch).numpy() for batch in batches_of(settings)]
    return np.concatenate(rows)[:, int(bos is not None) :]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((64, 3, 64), [8, 16, 32, 64]),
        ((1024, 7, 1023), [8, 16, 32, 64]),
        ((1024, 2, 1023), [256, 512, 1023]),
        ((8, 3, 4), [1, 2, 4]),
    ],
)
def test_steps_of_the_last_models(asked: tuple[int, int, int], expected: list[int]) -> None:
    assert step_counts(*asked) == expected


def test_more_steps_of_an_exact_model_are_better() -> None:
    """Tokens drawn at once do not know of each other; the source's own rows are the best that there are."""
    joint = markov(V, L, seed=3)
    train = np.random.default_rng(0).choice(V**L, 20_000, p=joint.ravel())
    rows = np.stack(np.unravel_index(train, joint.shape), axis=1)
    perplexity = bigram_model([rows], V)
    model = Known(joint)
    found = [measure("a", steps, draw(model, None, SETTINGS, steps), perplexity) for steps in (1, 2, L)]
    assert found[0].perplexity > 1.2 * found[1].perplexity > 1.2 * found[2].perplexity
    assert found[2].perplexity == pytest.approx(perplexity([rows[:5000]]), rel=0.03)
    assert found[2].perplexity == bigram_perplexity([rows], [draw(model, None, SETTINGS, L)], V)
    assert found[2].entropy == pytest.approx(unigram_entropy(rows[:5000]), rel=0.03)


def test_rows_of_images_have_their_classes_and_no_bos() -> None:
    config = PGMConfig(
        hidden=16, heads=2, encoder_blocks=1, decoder_blocks=1, dropout=0, classes=3, registers=2
    )
    torch.manual_seed(0)
    model = shake(build(config, 6, 5, 7))
    settings = SETTINGS.model_copy(update={"num_samples": 7, "batch": 4, "labels": (2, 0), "guidance": 1.0})
    rows = draw(model, 7, settings, 2)
    assert rows.shape == (7, 4)
    assert rows.max() < 6
    assert (rows == draw(model, 7, settings.model_copy(update={"batch": 7}), 2)).all()
    others = settings.model_copy(update={"labels": (1,)})
    assert (rows != draw(model, 7, others, 2)).any()


def test_table() -> None:
    assert step_quality.table(FOUND).splitlines() == [
        "| bigram perplexity (entropy) | 8 steps | 16 steps |",
        "| --- | --- | --- |",
        "| teacher | 20.50 (2.50) | 12.00 (2.25) |",
        "| round 1 | 15.00 (2.75) | 14.00 (2.12) |",
    ]


def test_figure() -> None:
    figure = quality_against_steps(step_quality.points(FOUND), 9.5)
    perplexity, entropy = figure.axes
    assert [list(line.get_ydata()) for line in perplexity.lines[:2]] == [[20.5, 12.0], [15.0, 14.0]]
    assert [list(line.get_ydata()) for line in entropy.lines] == [[2.5, 2.25], [2.75, 2.125]]
    assert {text.get_text() for text in perplexity.texts} == {"teacher", "round 1", "held out 9.5"}
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in perplexity.get_xticklabels()] == ["8", "16"]
