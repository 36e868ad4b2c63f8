"""Many samples, drawn in batches by Ray actors that each hold the model."""

import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from ray.util import ActorPool

from pipeline import storage
from pipeline.config.schema import SamplingConfig
from pipeline.data.tokenizers import Tokenizer, saved_tokenizer
from pipeline.evaluation.pictures import sample_grid
from pipeline.models import folder
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from pipeline.sampling.sampler import sample

log = logging.getLogger(__name__)

GRID_IMAGES = 80  # that the overview shows, at most


@dataclass(frozen=True)
class Samples:
    """Where the samples are, and the seconds that drawing them took (models loaded before)."""

    folder: str
    tokens: Int[np.ndarray, "n L"]
    labels: list[int] | None
    texts: list[str]
    seconds: float


class _Sampler:
    """One actor: the model on its device."""

    def __init__(self, model: str, settings: SamplingConfig, threads: int):
        torch.set_num_threads(threads)
        self._denoiser, _, self._facts = folder.read(storage.fetch(model))
        self._denoiser.to("cuda" if torch.cuda.is_available() else "cpu")
        self._settings = settings

    def classes(self) -> int | None:
        """Classes that the model knows; returns once the model is there."""
        embedding = self._denoiser.classes
        return None if embedding is None else embedding.num_embeddings - 1

    def draw(self, first: int, count: int) -> Int[np.ndarray, "count L"]:
        """Samples `first` to `first + count - 1`."""
        s, classes = self._settings, self.classes()
        labels = None if classes is None else labels_of(s, classes, first, count)
        tokens = sample(
            self._denoiser,
            count,
            s.steps,
            s.seed,
            Order.of(s),
            self._facts.bos,
            first=first,
            condition=None if labels is None else torch.tensor(labels),
            filters=Filters.of(s),
            refresh_every=s.refresh_every,
            guidance=s.guidance,
        )
        return tokens.cpu().numpy()


def generate(
    model: str, settings: SamplingConfig, actors: int, cpus: int, use_gpu: bool, into: str
) -> Samples:
    """Draw `settings.num_samples` rows and write them as tokens and, where there is a tokenizer, text or images.

    Args:
        model: consolidated folder that every node can read.
        actors: processes that draw batches at the same time.
        cpus: CPUs of an actor.
        into: folder for `tokens.npy`, `samples.jsonl`, and `samples.txt` or `images/` and `samples.png`.
    """
    # Never more processes than batches, nor than the cluster can hold at once.
    actors = max(1, min(actors, -(-settings.num_samples // settings.batch)))
    remote = ray.remote(_Sampler).options(num_cpus=cpus, num_gpus=int(use_gpu))
    ready: list[Any] = [remote.remote(model, settings, cpus) for _ in range(actors)]
    # Waits until the models are there, so that the rate below is of sampling alone.
    classes = ray.get([actor.classes.remote() for actor in ready])[0]
    pool = ActorPool(ready)
    starts: Any = range(0, settings.num_samples, settings.batch)
    began, done, drawn = time.perf_counter(), 0, []
    for rows in pool.map(
        lambda actor, first: actor.draw.remote(first, min(settings.batch, settings.num_samples - first)),
        starts,
    ):
        drawn.append(rows)
        done += len(rows)
        rate = done * rows.shape[1] / (time.perf_counter() - began)
        log.info("sampled %d of %d rows, %s tokens/s", done, settings.num_samples, f"{rate:,.0f}")
    seconds = time.perf_counter() - began
    tokens = np.concatenate(drawn)
    labels = None if classes is None else labels_of(settings, classes, 0, len(tokens))
    return Samples(into, tokens, labels, _write(model, tokens, labels, into), seconds)


def labels_of(settings: SamplingConfig, classes: int, first: int, count: int) -> list[int]:
    """Classes of samples `first` to `first + count - 1`: those that were asked for, or all, in turn."""
    asked = settings.labels or range(classes)
    return [asked[(first + i) % len(asked)] for i in range(count)]


def _write(model: str, tokens: Int[np.ndarray, "n L"], labels: list[int] | None, into: str) -> list[str]:
    local = storage.fetch(model)
    tokenizer, texts = saved_tokenizer(local), []
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
            _write_images(tokenizer.decode(tokens[:, 1:]), labels, Path(temporary))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        Path(temporary, "samples.jsonl").write_text(text, encoding="utf-8")
        storage.publish_folder(temporary, into)
    return texts


def _write_images(images: UInt8[np.ndarray, "n S S 3"], labels: list[int] | None, into: Path) -> None:
    (into / "images").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(into / "images" / f"{index:06d}.png")
    shown = slice(0, GRID_IMAGES)
    sample_grid(images[shown], labels and labels[shown]).savefig(into / "samples.png")
