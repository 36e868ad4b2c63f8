"""Evaluation of generated text: its metrics, and those of held-out text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluation.evaluated_model import EvaluatedModel
from pipeline.metrics.corpora import Corpus
from pipeline.metrics.draw import DrawnRows, Samples
from pipeline.metrics.external_lm import Scored, load_scorer_tokenizer, score_texts
from pipeline.metrics.ngram import Perplexity, bigram_model
from pipeline.metrics.text import has_mauve, text_measures
from pipeline.reports.measures import Group, Measure
from pipeline.reports.page import Block, Columns, excerpt
from pipeline.run import Run
from pipeline.sampling.row_ends import cut_rows, texts_of
from pipeline.training.finish import NGRAM_ROWS
from pipeline.training.validation import validation_rows

_BLOCK = 8192  # training rows read at a time


class TextEvaluator:
    """Evaluates generated text and compares it with held-out text.

    The held-out text is scored when the evaluator is made, before anything is sampled, so that a missing scorer fails
    early.

    Args:
        run: of the evaluation.
        corpus: its data.
        model: whose tokenizer decodes the rows.

    Attributes:
        real: metrics of the held-out text.
        texts: the held-out text.
        notes: remarks on the metrics for the report.

    Raises:
        ConfigError: there is no such scorer, or its context is shorter than the texts.
    """

    def __init__(self, run: Run, corpus: Corpus, model: EvaluatedModel):
        config, tokenizer = run.config, model.tokenizer
        assert config.data.kind == "text"
        settings, self._resources = config.evaluation, run.resources
        self._scorer, self._batch, self._bos = settings.scorer, settings.batch, model.facts.bos is not None
        self._tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else run.text_tokenizer
        held_out = corpus.reader("validation")
        count = min(config.sampling.num_samples, settings.rows)
        self._ids = model.facts.eot, model.facts.pad
        rows = held_out.rows(validation_rows(len(held_out), count))
        self.texts, self.notes = self._decode(rows), {}
        if self._scorer is not None:
            load_scorer_tokenizer(self._scorer).check_context(self.texts)
            self.notes = {} if has_mauve() else {"MAUVE": "left out, since mauve-text is not installed"}
        (self._scored,) = self._score([rows])
        self._bigram = _bigrams(corpus) if "train" in corpus.manifest.splits else None
        self.real = self._measures(rows, self._scored)

    def measure(self, drawn: Sequence[DrawnRows]) -> list[list[Measure]]:
        """Compute the metrics of samples.

        Args:
            drawn: samples of text.
        """
        groups = [one.tokens for one in drawn]
        return [
            self._measures(rows, scored, self._scored)
            for rows, scored in zip(groups, self._score(groups), strict=True)
        ]

    def excerpt(self, rows: Integer[np.ndarray, "n L"]) -> str:
        """Return the beginnings of the first rows as text.

        Args:
            rows: of token ids.
        """
        return excerpt(self._decode(rows))

    def report(self, samples: Samples, how: dict[str, Any]) -> tuple[list[Group], list[Block]]:
        """Compute the metrics of samples.

        Args:
            samples: generated text.
            how: how it was sampled.

        Returns:
            Metrics of the samples and of held-out text, and excerpts of both.
        """
        (measures,) = self.measure([samples])
        real = Group("real", "Real text", {"rows": len(self.texts), "split": "validation"}, self.real)
        texts = [("samples", excerpt(samples.texts)), ("held-out text", excerpt(self.texts))]
        return [Group("samples", "Samples", how, measures), real], [Columns(texts)]

    def _measures(
        self, rows: Integer[np.ndarray, "n L"], scored: Scored | None, real: Scored | None = None
    ) -> list[Measure]:
        """Compute the metrics of rows, without their padding."""
        cut = cut_rows(rows, *self._ids)
        return text_measures(cut, self._bos, self._bigram, scored, self._scorer, real)

    def _decode(self, rows: Integer[np.ndarray, "n L"]) -> list[str]:
        return texts_of(rows, *self._ids, self._tokenizer.decode)

    def _score(self, groups: Sequence[Integer[np.ndarray, "n L"]]) -> Sequence[Scored | None]:
        """Score groups of rows with one start of the scorer; None without a scorer."""
        if self._scorer is None:
            return [None] * len(groups)
        return score_texts(self._scorer, [*map(self._decode, groups)], self._batch, self._resources)


def _bigrams(corpus: Corpus) -> Perplexity:
    """Fit bigrams on the training rows."""
    train = corpus.reader("train")
    last = min(len(train), NGRAM_ROWS)
    blocks = (train.rows(np.arange(i, min(i + _BLOCK, last))) for i in range(0, last, _BLOCK))
    special = corpus.manifest.special
    cut = (cut_rows(block, special.eot, special.pad) for block in blocks)
    return bigram_model(cut, corpus.manifest.vocabulary)
