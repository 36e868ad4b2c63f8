"""How fast models draw: one process measures all of them in turn, at the same settings."""

import time

import torch

from pipeline import storage
from pipeline.config.schema import SamplingConfig
from pipeline.evaluation.generation import labels_of
from pipeline.models import folder
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from pipeline.sampling.sampler import sample


class Stopwatch:
    """A process that draws with one model after the other, on its device.

    Args:
        threads: CPU threads of the process.
    """

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def measure(self, model: str, settings: SamplingConfig) -> tuple[int, float]:
        """Parameters of a consolidated model, and the tokens/s at which it draws its second batch."""
        denoiser, _, facts = folder.read(storage.fetch(model))
        denoiser.to(self._device)
        classes = None if denoiser.classes is None else denoiser.classes.num_embeddings - 1
        labels = None if classes is None else labels_of(settings, classes, 0, settings.batch)
        for _ in range(2):
            began = time.perf_counter()
            drawn = sample(
                denoiser,
                settings.batch,
                settings.steps,
                settings.seed,
                Order.of(settings),
                facts.bos,
                condition=None if labels is None else torch.tensor(labels),
                filters=Filters.of(settings),
                refresh_every=settings.refresh_every,
                guidance=settings.guidance,
            ).cpu()
            seconds = time.perf_counter() - began
        parameters = sum(value.numel() for value in denoiser.parameters())
        return parameters, drawn.numel() / seconds
