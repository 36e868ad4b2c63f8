"""How fast models draw: one process measures all of them in turn, at the same settings."""

import time

from pipeline.config.schema import SamplingConfig
from pipeline.metrics.draw import Sampler


class Stopwatch:
    """A process that draws with one model after the other, and holds one at a time.

    Args:
        threads: CPU threads of the process.
    """

    def __init__(self, threads: int):
        self._threads = threads

    def measure(self, model: str, settings: SamplingConfig) -> tuple[int, float]:
        """Parameters of a consolidated model, and the tokens/s at which it draws its second batch."""
        sampler = Sampler(model, self._threads, settings.precision)
        for _ in range(2):
            began = time.perf_counter()
            drawn = sampler.draw(settings, 0, settings.batch)
            seconds = time.perf_counter() - began
        return sampler.parameters(), drawn.size / seconds
