"""Sampling of many rows: in batches, by Ray actors that each hold a model.

Everything that draws rows from a trained model goes through this file: `jobs.sample`, evaluation, comparisons,
sweeps, and the samples that are shown during training.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image

from pipeline import storage
from pipeline.config.evaluation import Precision, SamplingConfig
from pipeline.data.tokenizers import IMAGES_AT_ONCE, PairTokenizer, Tokenizer, saved_tokenizer
from pipeline.logs import Progress
from pipeline.metrics.class_names import with_class_ids
from pipeline.metrics.given import Given
from pipeline.models import model_folder, vq
from pipeline.models.denoiser import DTYPES, Denoiser
from pipeline.models.head import Modalities
from pipeline.reports.pictures import captioned_grid, sample_grid
from pipeline.reports.view import ROWS, VIEW, Revealed, names_of
from pipeline.runtime.actors import Resources, in_order, own_device, started
from pipeline.sampling.row_ends import RowEnds, cut_rows, sample_rows, texts_of
from pipeline.sampling.sampler import Known, SamplingRequest, known_tokens

GRID = "samples.png"
GRID_IMAGES = ROWS  # images of the overview, at most


@dataclass(frozen=True)
class DrawnBatch:
    """A batch of rows.

    Attributes:
        tokens: the rows.
        seconds: that it took to draw them.
        revealed_at: the step at which every position was drawn; empty unless `sampling.view` shows it.
    """

    tokens: Int[np.ndarray, "n L"]
    seconds: float
    revealed_at: Int[np.ndarray, "m L"]


class DrawnRows(Protocol):
    """Rows that were drawn, as evaluators measure them.

    Attributes:
        tokens: the rows.
        labels: class of every row; None for a model without classes.
    """

    @property
    def tokens(self) -> Int[np.ndarray, "n L"]: ...

    @property
    def labels(self) -> list[int] | None: ...


@dataclass(frozen=True)
class Samples:
    """Rows that `generate` has drawn.

    Attributes:
        folder: of the files.
        tokens: the rows.
        labels: class of every row; None for a model without classes.
        texts: of the rows; empty for images.
        seconds: duration of drawing the tokens, models loaded before.
    """

    folder: str
    tokens: Int[np.ndarray, "n L"]
    labels: list[int] | None
    texts: list[str]
    seconds: float


def draw_rows(
    model: Denoiser,
    settings: SamplingConfig,
    facts: model_folder.DataFacts,
    batch: tuple[int, int],
    revealed_at: Int[torch.Tensor, "n L"] | None = None,
    known: Known | None = None,
) -> Int[torch.Tensor, "n L"]:
    """Draw a batch of rows in this process.

    Args:
        model: in eval mode.
        settings: how to draw.
        facts: how rows of the model begin and end.
        batch: index of the first row, and the number of rows. A row depends on its index, not on the batch.
        revealed_at: receives the step at which every position was drawn.
        known: given tokens, as `known_tokens` takes them; None: none.

    Returns:
        Rows of ids, BOS and padding included.
    """
    (first, count), condition = batch, None
    if model.classes is not None:
        condition = torch.tensor(labels_of(settings, model.classes.num_embeddings - 1, first, count))
    request, indices = SamplingRequest.of(settings, facts.bos), range(first, first + count)
    tokens = known_tokens(known, count, model.length)
    request = replace(request, num_samples=count, condition=condition, indices=indices, known=tokens)
    return sample_rows(model, request, RowEnds.of(facts), settings.length, revealed_at=revealed_at)


class Sampler:
    """Draws rows from consolidated models on one device; one Ray actor holds one.

    Args:
        threads: CPU threads.
        capacity: number of models held in memory; the oldest makes room for a new one.
    """

    def __init__(self, threads: int, capacity: int = 1):
        torch.set_num_threads(threads)
        self._capacity = capacity
        self._models: dict[tuple[str, Precision], tuple[Denoiser, model_folder.DataFacts]] = {}
        self._tokenizers: dict[str, tuple[vq.ImageTokenizer, Modalities | None]] = {}

    def load(self, folder: str, precision: Precision) -> None:
        """Load a model, unless it is in memory.

        Args:
            folder: of the model, readable on every node.
            precision: of its weights.
        """
        if (folder, precision) not in self._models:
            if len(self._models) == self._capacity:
                del self._models[next(iter(self._models))]
            model, _, facts = model_folder.read(storage.fetch(folder))
            self._models[folder, precision] = model.to(own_device(), DTYPES[precision]), facts

    def draw(
        self,
        folder: str,
        settings: SamplingConfig,
        first: int,
        count: int,
        known: Known | None = None,
    ) -> DrawnBatch:
        """Draw rows `first` to `first + count - 1` from a model; loading it is not part of the time.

        Args:
            folder: of the model, readable on every node.
            settings: how to draw.
            first: index of the first row.
            count: number of rows.
            known: given tokens of these rows, as `known_tokens` takes them; None: none.
        """
        self.load(folder, settings.precision)
        model, facts = self._models[folder, settings.precision]
        settings = with_class_ids(settings, facts.class_names)
        began = time.perf_counter()
        revealed_at = torch.zeros(count if settings.view else 0, model.length, dtype=torch.int64)
        steps = revealed_at if settings.view else None
        tokens = draw_rows(model, settings, facts, (first, count), steps, known).cpu().numpy()
        return DrawnBatch(tokens, time.perf_counter() - began, revealed_at.numpy())

    def decode(self, folder: str, tokens: Int[np.ndarray, "n L"]) -> UInt8[np.ndarray, "n S S 3"]:
        """Turn rows into images with the tokenizer of a model's folder.

        Args:
            folder: of the model.
            tokens: rows, BOS or captions included.
        """
        if folder not in self._tokenizers:
            local = storage.fetch(folder)
            tokenizer = vq.load_image_tokenizer(str(local), None, IMAGES_AT_ONCE, own_device())
            self._tokenizers[folder] = tokenizer, model_folder.read_config(local)[1].modalities
        tokenizer, modalities = self._tokenizers[folder]
        start, shift = modalities or (1, 0)
        return tokenizer.decode(tokens[:, start:] - shift)


def batches_of(settings: SamplingConfig) -> list[tuple[int, int]]:
    """Split `num_samples` into batches.

    Args:
        settings: of the sampling.

    Returns:
        Index of the first row and number of rows, for every batch.
    """
    count = settings.num_samples
    return [(first, min(settings.batch, count - first)) for first in range(0, count, settings.batch)]


def labels_of(settings: SamplingConfig, classes: int, first: int, count: int) -> list[int]:
    """List the classes of rows `first` to `first + count - 1`: those of the settings, or all, in turn.

    Args:
        settings: of the sampling, with classes as numbers.
        classes: number of classes of the model.
        first: index of the first row.
        count: number of rows.
    """
    labels = settings.labels or range(classes)
    return [int(labels[(first + i) % len(labels)]) for i in range(count)]


def generate(
    model: str, settings: SamplingConfig, resources: Resources, into: str, given: Given | None = None
) -> Samples:
    """Draw `settings.num_samples` rows and write them as tokens and, where there is a tokenizer, text or images.

    Args:
        model: consolidated folder that every node can read.
        settings: how to draw.
        resources: of the actors, which draw batches at the same time.
        into: folder for `tokens.npy`, `samples.jsonl`, and `samples.txt` or `images/` and `samples.png`; `view.html`
            where the settings ask for it.
        given: what the samples are drawn around; None: nothing.
    """
    local, parts = storage.fetch(model), batches_of(settings)
    config, facts = model_folder.read_config(local)
    classes, tokenizer = config.classes, saved_tokenizer(local)
    settings = with_class_ids(settings, facts.class_names)
    known = None if given is None else given.known
    with started(Sampler, (resources.cpus,), resources, len(parts)) as samplers:
        list(in_order(samplers, "load", [(model, settings.precision)] * len(samplers)))
        progress = Progress("sampled", "batches", len(parts), "tokens")
        began, drawn = time.perf_counter(), []
        for batch in in_order(samplers, "draw", [(model, settings, *part, known) for part in parts]):
            drawn.append(batch)
            progress.add(batch.tokens.size)
        seconds = time.perf_counter() - began
        images = in_order(samplers, "decode", [(model, batch.tokens) for batch in drawn])
        tokens = np.concatenate([batch.tokens for batch in drawn])
        labels = None if classes is None else labels_of(settings, classes, 0, len(tokens))
        end, texts, pictures = None if given is None else given.end, [], None
        if isinstance(tokenizer, Tokenizer):
            texts = texts_of(tokens[:, :end], facts.eot, facts.pad, tokenizer.decode)
        elif isinstance(tokenizer, PairTokenizer):
            texts = tokenizer.captions(tokens, facts.caption or 0)
        with storage.scratch() as folder:
            np.save(folder / "tokens.npy", tokens)
            columns = {"index": range(len(tokens)), "label": labels, "text": texts}
            if given is not None and given.text:
                columns["given"] = [given.text] * len(tokens)
            columns = {name: values for name, values in columns.items() if values}
            rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
            if texts:
                blocks = [f"--- given\n{given.text}\n"] if given is not None else []
                blocks += [f"--- sample {i}\n{text}\n" for i, text in enumerate(texts)]
                (folder / "samples.txt").write_text("\n".join(blocks), encoding="utf-8")
            if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
                pictures = _write_images(images, labels, texts, folder)
            if settings.view:
                shown_rows = cut_rows(tokens[:, :end], facts.eot, facts.pad)
                revealed_at = np.concatenate([batch.revealed_at for batch in drawn])
                names = names_of(labels, facts.class_names)
                if isinstance(tokenizer, PairTokenizer):  # the codes of images, each under its caption
                    shown_rows, revealed_at = (x[:, facts.caption :] for x in (tokens, revealed_at))
                    names, tokenizer = texts, None
                shown = Revealed(
                    shown_rows, revealed_at, settings.steps, facts.bos, tokenizer, pictures, names
                )
                name = model_folder.read_background(local).run.get("name", config.kind)
                about = {"model": name} | describe(settings, len(tokens))
                if given is not None and given.text:
                    about["given"] = given.text
                (folder / VIEW).write_text(shown.to_html(about), encoding="utf-8")
            if given is not None and given.picture is not None:
                Image.fromarray(given.picture).save(folder / "given.png")
            storage.publish_folder(folder, into)
    return Samples(into, tokens, labels, texts, seconds)


def describe(settings: SamplingConfig, count: int) -> dict[str, object]:
    """Describe for a report how rows were drawn; settings without effect are left out.

    Args:
        settings: of the sampling.
        count: number of rows.
    """
    optional = {
        "schedule": settings.schedule,
        "gumbel": settings.gumbel if settings.order == "confidence" else None,
        "gamma": settings.gamma if settings.order == "entropy" else None,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "guidance": settings.guidance or None,
        "refresh_every": settings.refresh_every if settings.refresh_every > 1 else None,
        "labels": settings.labels,
        "length": settings.length,
    }
    how: dict[str, object] = {"samples": count, "order": settings.order, "steps": settings.steps}
    how |= {"temperature": settings.temperature}
    how |= {key: value for key, value in optional.items() if value is not None}
    return how | {"seed": settings.seed, "precision": str(DTYPES[settings.precision]).removeprefix("torch.")}


def _write_images(
    batches: Iterable[UInt8[np.ndarray, "n S S 3"]], labels: list[int] | None, captions: list[str], into: Path
) -> UInt8[np.ndarray, "m S S 3"]:
    """Write a PNG of every image, and an overview of the first ones, which are returned."""
    (into / "images").mkdir()
    overview: list[np.ndarray] = []
    for index, image in enumerate(chain.from_iterable(batches)):
        Image.fromarray(image).save(into / "images" / f"{index:06d}.png")
        if index < GRID_IMAGES:
            overview.append(image)
    shown = np.stack(overview)
    figure = (
        captioned_grid(shown, captions) if captions else sample_grid(shown, labels and labels[:GRID_IMAGES])
    )
    figure.savefig(into / GRID)
    return shown
