"""Evaluation of a model of images with captions: pictures of samples, and how well it matches captions to images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from pipeline import storage
from pipeline.evaluation.evaluated_model import EvaluatedModel
from pipeline.metrics.corpora import Case, Corpus, caption_bounds
from pipeline.metrics.draw import GRID, GRID_IMAGES, DrawnRows, Samples
from pipeline.reports.measures import Group, Measure, share_measure
from pipeline.reports.page import Block, Picture, picture
from pipeline.reports.pictures import captioned_grid
from pipeline.run import Run
from pipeline.training.validation import pair_tokenizer, validation_rows

CANDIDATES = 10  # captions among which an image's own is to be found


class PairEvaluator:
    """Shows generated captions with their images beside held-out ones; there are no metrics of them.

    Args:
        run: of the evaluation.
        corpus: its data.

    Attributes:
        real: metrics of held-out pairs; none.
        notes: remarks on the metrics for the report.
    """

    def __init__(self, run: Run, corpus: Corpus):
        reader, self.notes = corpus.reader("validation"), dict[str, str]()
        self.real: list[Measure] = []
        self._rows = reader.rows(validation_rows(len(reader), GRID_IMAGES))
        self._tokenizer, self._caption = pair_tokenizer(run), corpus.manifest.caption or 0

    def report(self, samples: Samples, how: dict[str, Any]) -> tuple[list[Group], list[Block]]:
        """Show samples.

        Args:
            samples: generated captions and images.
            how: how they were sampled.

        Returns:
            The group of the samples, which has no metrics, and pictures of them and of held-out pairs.
        """
        overview = storage.read_bytes(storage.join(samples.folder, GRID))
        shown = [Picture("samples", overview, "Samples"), self.held_out]
        return [Group("samples", "Samples", how, [])], [*shown]

    def measure(self, drawn: Sequence[DrawnRows]) -> list[list[Measure]]:
        """Return no metrics of samples.

        Args:
            drawn: samples.
        """
        return [[] for _ in drawn]

    @property
    def held_out(self) -> Picture:
        """The picture of held-out pairs."""
        return self.shown(self._rows, "held_out", "Held-out images")

    def shown(self, rows: Integer[np.ndarray, "n L"], name: str, title: str) -> Picture:
        """Draw the first pairs.

        Args:
            rows: of token ids.
            name: of the picture's file, without the suffix.
            title: below the picture.
        """
        rows = rows[:GRID_IMAGES]
        images = self._tokenizer.images(rows, self._caption)
        return picture(name, captioned_grid(images, self._tokenizer.captions(rows, self._caption)), title)


def matching_groups(run: Run, corpus: Corpus, model: EvaluatedModel) -> list[Group]:
    """Count the held-out images that are likelier with their own caption than with other held-out ones.

    With equal prior probabilities of the captions, the likeliest one is that with the smallest -log p(image |
    caption). A tie counts as wrong. All kinds of models are measured alike, autoregressive ones exactly.

    Args:
        run: of the evaluation.
        corpus: its data.
        model: of such data.

    Returns:
        The report's group of the result; none without captions, or if all captions are the same.
    """
    reader, places = corpus.reader("validation"), corpus.manifest.caption or 0
    if not places:
        return []
    index, seed = validation_rows(len(reader), run.config.evaluation.rows), run.config.seed
    candidates = draw_candidates(reader.rows(index)[:, :places], seed)
    if candidates.shape[1] < 2:
        return []
    case = Case(model.folder, corpus, index, model.masking, "caption")
    bounds = caption_bounds(case, candidates, run.resources)
    right = bounds[:, 0] < bounds[:, 1:].min(1)
    how = {"split": "validation", "rows": len(index), "draws": model.masking.draws, "seed": seed}
    name = f"own caption is the likeliest of {candidates.shape[1]}"
    own = share_measure("own", name, right, "-log p(image | caption)")
    return [Group("validation_captions", "Validation, captions matched to images", how, [own])]


def draw_candidates(captions: Int[np.ndarray, "R C"], seed: int) -> Int[np.ndarray, "R K"]:
    """Choose other captions at random for every row, all different.

    Args:
        captions: ids of every row's own.
        seed: of the choice.

    Returns:
        Rows that have the captions, the first of which is the row itself; fewer than `CANDIDATES` if there are not
        as many different captions.
    """
    _, firsts, texts = np.unique(captions, axis=0, return_index=True, return_inverse=True)
    rng, count = np.random.default_rng(seed), min(CANDIDATES, len(firsts))
    candidates = np.empty((len(captions), count), np.int64)
    for row, text in enumerate(texts.reshape(-1).tolist()):
        drawn = rng.choice(len(firsts), count, replace=False)
        candidates[row] = [row, *firsts[drawn[drawn != text]][: count - 1]]
    return candidates
