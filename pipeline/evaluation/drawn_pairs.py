"""Evaluation of generated captions and images: pictures of them, and of held-out ones."""

from typing import Any

from pipeline import storage
from pipeline.metrics.corpora import Corpus
from pipeline.metrics.draw import GRID, GRID_IMAGES, Samples
from pipeline.reports.measures import Group
from pipeline.reports.page import Block, Picture, picture
from pipeline.reports.pictures import captioned_grid
from pipeline.run import Run
from pipeline.training.validation import pair_tokenizer, validation_rows


class PairEvaluator:
    """Shows generated captions with their images beside held-out ones; what is measured of them is their likelihood.

    Args:
        run: of the evaluation.
        corpus: its data.

    Attributes:
        notes: remarks on the metrics for the report.
    """

    def __init__(self, run: Run, corpus: Corpus):
        reader, self.notes = corpus.reader("validation"), dict[str, str]()
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
        images = self._tokenizer.images(self._rows, self._caption)
        grid = captioned_grid(images, self._tokenizer.captions(self._rows, self._caption))
        pictures = [Picture("samples", overview, "Samples"), picture("held_out", grid, "Held-out images")]
        return [Group("samples", "Samples", how, [])], [*pictures]
