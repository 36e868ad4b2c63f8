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
from jaxtyping import Int
from ray.util import ActorPool

from pipeline import storage
from pipeline.config.schema import SamplingConfig
from pipeline.data.tokenizers import INFO_FILE, load_tokenizer
from pipeline.models import folder
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from pipeline.sampling.sampler import sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Where the samples are, and the seconds that drawing them took (models loaded before)."""

    folder: str
    tokens: Int[np.ndarray, "n L"]
    texts: list[str]
    seconds: float


class _Sampler:
    """One actor: the model on its device."""

    def __init__(self, model: str, settings: SamplingConfig, threads: int):
        torch.set_num_threads(threads)
        self._denoiser, _, self._facts = folder.read(storage.fetch(model))
        self._denoiser.to("cuda" if torch.cuda.is_available() else "cpu")
        self._settings = settings

    def load(self) -> None:
        """Return once the model is there."""

    def draw(self, first: int, count: int) -> Int[np.ndarray, "count L"]:
        """Samples `first` to `first + count - 1`."""
        s = self._settings
        tokens = sample(
            self._denoiser,
            count,
            s.steps,
            s.seed,
            Order(s.order, s.schedule, s.gumbel, s.gamma),
            self._facts.bos,
            first=first,
            filters=Filters(s.temperature, s.top_k, s.top_p),
            refresh_every=s.refresh_every,
        )
        return tokens.cpu().numpy()


def generate(
    model: str, settings: SamplingConfig, actors: int, cpus: int, use_gpu: bool, into: str
) -> Samples:
    """Draw `settings.num_samples` rows and write them as tokens and, where there is a tokenizer, as text.

    Args:
        model: consolidated folder that every node can read.
        actors: processes that draw batches at the same time.
        cpus: CPUs of an actor.
        into: folder for `tokens.npy`, `samples.jsonl` and `samples.txt`.
    """
    # Never more processes than batches, nor than the cluster can hold at once.
    actors = max(1, min(actors, -(-settings.num_samples // settings.batch)))
    remote = ray.remote(_Sampler).options(num_cpus=cpus, num_gpus=int(use_gpu))
    ready: list[Any] = [remote.remote(model, settings, cpus) for _ in range(actors)]
    ray.get([actor.load.remote() for actor in ready])  # so that the rate below is of sampling alone
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
    return Samples(into, tokens, _write(model, tokens, into), seconds)


def _write(model: str, tokens: Int[np.ndarray, "n L"], into: str) -> list[str]:
    local = storage.fetch(model)
    texts = []
    with tempfile.TemporaryDirectory() as temporary:
        np.save(os.path.join(temporary, "tokens.npy"), tokens)
        if (local / INFO_FILE).is_file():
            tokenizer = load_tokenizer(str(local))
            texts = [tokenizer.decode(row) for row in tokens.tolist()]
            lines = [
                json.dumps({"index": i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)
            ]
            Path(temporary, "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            blocks = [f"--- sample {i}\n{text}\n" for i, text in enumerate(texts)]
            Path(temporary, "samples.txt").write_text("\n".join(blocks), encoding="utf-8")
        storage.publish_folder(temporary, into)
    return texts
