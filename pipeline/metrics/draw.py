"""Many samples, drawn in batches by Ray actors that each hold the model."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image

from pipeline import storage
from pipeline.config.schema import Precision, SamplingConfig
from pipeline.data.tokenizers import IMAGES_AT_ONCE, Tokenizer, saved_tokenizer
from pipeline.models import model_folder, vq
from pipeline.models.denoiser import DTYPES
from pipeline.reports.pictures import sample_grid
from pipeline.runtime.actors import Resources, in_order, own_device, started
from pipeline.sampling.sampler import SamplingRequest, sample

log = logging.getLogger(__name__)

GRID = "samples.png"
GRID_IMAGES = 80  # that the overview shows, at most


@dataclass(frozen=True)
class Samples:
    """Where the samples are, and the seconds that drawing their tokens took (models loaded before)."""

    folder: str
    tokens: Int[np.ndarray, "n L"]
    labels: list[int] | None
    texts: list[str]
    seconds: float


class Sampler:
    """One actor: the model, and the tokenizer of its images, on its device."""

    def __init__(self, model: str, threads: int, precision: Precision):
        torch.set_num_threads(threads)
        local, device = storage.fetch(model), own_device()
        self._denoiser, _, self._facts = model_folder.read(local)
        self._denoiser.to(device, DTYPES[precision])
        torch.backends.cuda.matmul.allow_tf32 = precision == "bf16"  # which has all bits of bf16: see Engine
        self._images: vq.ImageTokenizer | None = None
        if (local / vq.INFO_FILE).is_file():
            self._images = vq.load_image_tokenizer(str(local), None, IMAGES_AT_ONCE, device)

    def classes(self) -> int | None:
        """Classes that the model knows; returns once the model is there."""
        embedding = self._denoiser.classes
        return None if embedding is None else embedding.num_embeddings - 1

    def parameters(self) -> int:
        """Of the model."""
        return sum(value.numel() for value in self._denoiser.parameters())

    def draw(self, settings: SamplingConfig, first: int, count: int) -> Int[np.ndarray, "count L"]:
        """Samples `first` to `first + count - 1`."""
        classes = self.classes()
        labels = None if classes is None else labels_of(settings, classes, first, count)
        request = replace(
            SamplingRequest.of(settings, self._facts.bos),
            num_samples=count,
            indices=range(first, first + count),
            condition=None if labels is None else torch.tensor(labels),
        )
        return sample(self._denoiser, request).cpu().numpy()

    def pictures(self, tokens: Int[np.ndarray, "n L"]) -> UInt8[np.ndarray, "n S S 3"] | None:
        """The images of rows; None from a model that draws none."""
        return None if self._images is None else self._images.decode(tokens[:, 1:])


def generate(model: str, settings: SamplingConfig, resources: Resources, into: str) -> Samples:
    """Draw `settings.num_samples` rows and write them as tokens and, where there is a tokenizer, text or images.

    Args:
        model: consolidated folder that every node can read.
        resources: of the actors, which draw batches at the same time.
        into: folder for `tokens.npy`, `samples.jsonl`, and `samples.txt` or `images/` and `samples.png`.
    """
    starts = range(0, settings.num_samples, settings.batch)
    parts = [(settings, first, min(settings.batch, settings.num_samples - first)) for first in starts]
    with started(Sampler, (model, resources.cpus, settings.precision), resources, len(parts)) as samplers:
        # Waits until the models are there, so that the rate below is of sampling alone.
        classes, *_ = in_order(samplers, "classes", [()] * len(samplers))
        began, done, drawn = time.perf_counter(), 0, []
        for rows in in_order(samplers, "draw", parts):
            drawn.append(rows)
            done += len(rows)
            rate = done * rows.shape[1] / (time.perf_counter() - began)
            log.info("sampled %d of %d rows, %s tokens/s", done, settings.num_samples, f"{rate:,.0f}")
        seconds = time.perf_counter() - began
        tokens = np.concatenate(drawn)
        labels = None if classes is None else labels_of(settings, classes, 0, len(tokens))
        pictures = in_order(samplers, "pictures", [(rows,) for rows in drawn])
        return Samples(into, tokens, labels, _write(model, tokens, labels, pictures, into), seconds)


def labels_of(settings: SamplingConfig, classes: int, first: int, count: int) -> list[int]:
    """Classes of samples `first` to `first + count - 1`: those that were asked for, or all, in turn."""
    asked = settings.labels or range(classes)
    return [asked[(first + i) % len(asked)] for i in range(count)]


def describe(settings: SamplingConfig, count: int) -> dict[str, object]:
    """How samples were drawn, for reports; settings without effect are left out."""
    told: dict[str, object] = {"samples": count, "order": settings.order, "steps": settings.steps}
    told |= {"temperature": settings.temperature}
    optional = {
        "schedule": settings.schedule,
        "gumbel": settings.gumbel if settings.order == "confidence" else None,
        "gamma": settings.gamma if settings.order == "entropy" else None,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "guidance": settings.guidance or None,
        "refresh_every": settings.refresh_every if settings.refresh_every > 1 else None,
        "labels": settings.labels,
    }
    told |= {key: value for key, value in optional.items() if value is not None}
    return told | {"seed": settings.seed, "precision": str(DTYPES[settings.precision]).removeprefix("torch.")}


def _write(
    model: str,
    tokens: Int[np.ndarray, "n L"],
    labels: list[int] | None,
    pictures: Iterable[UInt8[np.ndarray, "n S S 3"] | None],
    into: str,
) -> list[str]:
    tokenizer, texts = saved_tokenizer(storage.fetch(model)), []
    with tempfile.TemporaryDirectory() as temporary:
        np.save(os.path.join(temporary, "tokens.npy"), tokens)
        lines: list[dict[str, Any]] = [{"index": i} for i in range(len(tokens))]
        if labels is not None:
            lines = [{**line, "label": label} for line, label in zip(lines, labels, strict=True)]
        if isinstance(tokenizer, Tokenizer):
            texts = [tokenizer.decode(row) for row in tokens.tolist()]
            lines = [{**line, "text": text} for line, text in zip(lines, texts, strict=True)]
            blocks = [f"--- sample {i}\n{text}\n" for i, text in enumerate(texts)]
            Path(temporary, "samples.txt").write_text("\n".join(blocks), encoding="utf-8")
        elif tokenizer is not None:
            _write_images(pictures, labels, Path(temporary))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        Path(temporary, "samples.jsonl").write_text(text, encoding="utf-8")
        storage.publish_folder(temporary, into)
    return texts


def _write_images(
    batches: Iterable[UInt8[np.ndarray, "n S S 3"] | None], labels: list[int] | None, into: Path
) -> None:
    """A PNG for every image as they come, and one of the first."""
    (into / "images").mkdir()
    first: list[np.ndarray] = []
    index = 0
    for images in batches:
        assert images is not None, "a model folder with a tokenizer of images"
        for image in images:
            Image.fromarray(image).save(into / "images" / f"{index:06d}.png")
            index += 1
        first += list(images[: GRID_IMAGES - len(first)])
    sample_grid(np.stack(first), labels and labels[:GRID_IMAGES]).savefig(into / GRID)
