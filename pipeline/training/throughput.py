"""The speed of training: rows, tokens and operations a second, and the share of the GPUs' peak."""

import torch

from pipeline.models.model_folder import DataFacts
from pipeline.planning.gpus import gpu_of
from pipeline.planning.plan import row_flops
from pipeline.run import Run


class Throughput:
    """The speed of a run's steps as metrics.

    Operations are those that the objective needs, counted by `planning.plan.row_flops`: what activation checkpointing
    computes again is not among them. Padding is no token, and rows with padding count as rows of their mean length.

    Args:
        run: with its data.
        workers: number of workers.
        device: of this worker; the others have the same type.
    """

    def __init__(self, run: Run, workers: int, device: torch.device):
        config, manifest = run.config, run.manifest
        special, lengths = manifest.special, manifest.split("train").row_lengths
        self._batch, self._length = config.train.batch, float(manifest.length)
        if lengths:
            self._length = sum(length * rows for length, rows in enumerate(lengths)) / sum(lengths)
        facts = DataFacts(manifest.vocabulary, round(self._length), special.bos, special.eot)
        self._row_flops = row_flops(config, facts)
        gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        bf16 = config.train.precision == "bf16"
        self._peak = None if gpu is None else workers * 1e12 * (gpu.bf16 if bf16 else gpu.fp32)

    def metrics(self, steps: int, seconds: float) -> dict[str, float]:
        """Compute the metrics of some steps.

        Args:
            steps: number of them.
            seconds: that they took.

        Returns:
            Rates of all workers together by name; `train/mfu` is the share of the peak of the GPUs, where their type
            is in the table of `planning.gpus`.
        """
        rows = self._batch * steps / seconds
        metrics = {
            "train/rows_per_second": rows,
            "train/tokens_per_second": rows * self._length,
            "train/teraflops": rows * self._row_flops / 1e12,
        }
        if self._peak is not None:
            metrics["train/mfu"] = rows * self._row_flops / self._peak
        return metrics
