"""Step time, memory and communication of training on 1 to 1,024 GPUs, predicted.

`python -m pipeline.planning.scaling` prints the tables of docs/scaling.md. They follow from the operations that a
step needs, published rates of GPUs and links, and one measured number: the share of a GPU's peak that training
reaches. Nothing here was run on that many GPUs.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from pipeline.config.schema import MDLMConfig, PGMConfig, TrainConfig
from pipeline.models import build
from pipeline.models.flops import flops, training_work
from pipeline.models.layers import CHUNK_LOGITS
from pipeline.planning.plan import GPUS, states

Stage = Literal[0, 1, 2, 3]

HOP = (
    10e-6  # seconds for a message to the next GPU, an assumption; matters for small models on many GPUs only
)
# Bytes that a block keeps for its backward pass, for a token and an entry of the hidden size, in bf16 with
# attention that keeps no scores (arXiv 2205.05198, table 2: 34 s b h). Cross-attention keeps as much.
KEPT = 34
DRAWS = 64  # batches of random groups that a mean number of operations is taken over


@dataclass(frozen=True)
class Gpu:
    """A GPU and the links of its server.

    Attributes:
        flops: dense bf16 FLOP/s.
        bandwidth: of its memory, bytes/s.
        inside: to its neighbours in the server, bytes/s a direction.
        outside: of all network adapters of the server together, bytes/s a direction.
        servers: GPUs of a server.
    """

    name: str
    flops: float
    bandwidth: float
    inside: float
    outside: float
    servers: int = 8


# Links from NVIDIA's data sheets: A100 80GB SXM and DGX A100 (8 adapters of 200 Gb/s); H100 SXM and DGX H100
# (8 of 400 Gb/s).
A100 = Gpu("A100 80GB", GPUS["a100-80gb"].bf16 * 1e12, 2039e9, 600e9 / 2, 8 * 25e9)
# The same GPUs behind one 100 Gb/s Ethernet adapter a server, as clouds without InfiniBand rent them.
A100_ETHERNET = Gpu("A100 80GB, 100 Gb/s a server", A100.flops, 2039e9, 600e9 / 2, 12.5e9)
H100 = Gpu("H100 80GB", GPUS["h100"].bf16 * 1e12, 3350e9, 900e9 / 2, 8 * 50e9)


@dataclass(frozen=True)
class Recipe:
    """What is trained.

    Attributes:
        measured: sequences/s of one A100 at batch 32, as arXiv 2505.18883 reports of the authors' code.
    """

    name: str
    model: PGMConfig | MDLMConfig
    vocabulary: int
    length: int
    measured: float

    @cached_property
    def parameters(self) -> int:
        with torch.device("meta"):  # shapes without values
            return sum(p.numel() for p in build(self.model, self.vocabulary, self.length).parameters())

    @cached_property
    def flops_of_a_row(self) -> float:
        """Needed for forward and backward, mean over random groups of the log-linear schedule."""
        rng = np.random.default_rng(0)
        times = (np.arange(DRAWS) + 0.5) / DRAWS
        groups = rng.random((DRAWS, self.length)) < times[:, None]
        return flops(training_work(self.model, self.vocabulary, groups), backward=True) / DRAWS

    @property
    def share(self) -> float:
        """Of an A100's peak, by needed operations, that the reported throughput reaches."""
        return self.measured * self.flops_of_a_row / A100.flops


def _pgm(encoder: int, decoder: int, hidden: int, heads: int) -> PGMConfig:
    return PGMConfig(encoder_blocks=encoder, decoder_blocks=decoder, hidden=hidden, heads=heads)


PGM_8_8 = Recipe("PGM 8/8, H 768", _pgm(8, 8, 768, 12), 50_257, 1024, 68.0)
PGM_6_6 = Recipe("PGM 6/6, H 1024", _pgm(6, 6, 1024, 16), 50_257, 1024, 62.9)


@dataclass(frozen=True)
class Prediction:
    """One step on so many GPUs; times in seconds.

    Attributes:
        rows: of a GPU in one step.
        compute: forward and backward at the share of the peak.
        communication: gradients and weights, not overlapped with anything.
        optimiser: reading and writing a GPU's part of the optimiser's state.
        memory: bytes a GPU.
    """

    gpus: int
    rows: float
    compute: float
    communication: float
    optimiser: float
    memory: float

    @property
    def step(self) -> float:
        return self.compute + self.communication + self.optimiser

    @property
    def largest(self) -> str:
        terms = {name: getattr(self, name) for name in ("compute", "communication", "optimiser")}
        return max(terms, key=lambda name: terms[name])

    @property
    def efficiency(self) -> float:
        """Sequences a second of a GPU over those of one that does nothing but compute."""
        return self.compute / self.step


def predict(
    parameters: int,
    flops_of_a_row: float,
    kept_of_a_row: float,
    logits_of_a_row: float,
    rows: float,
    gpus: int,
    gpu: Gpu,
    share: float,
    stage: Stage = 1,
    micro_batch: int = 32,
) -> Prediction:
    """A step of `rows` rows a GPU.

    Communication is a ring's: a reduce-scatter or an all-gather of b bytes over n GPUs moves b (n - 1) / n through
    every link. Stages 0 to 2 need two of them a step (gradients, then weights), stage 3 a third (weights again in
    the backward pass) and all three for every micro-batch; bf16, two bytes a value.

    Args:
        kept_of_a_row: bytes of activations that a row keeps for the backward pass.
        logits_of_a_row: entries, of which there are no more than a chunk at a time.
        share: of the GPU's peak.
        stage: of ZeRO.
        micro_batch: rows of a GPU in one forward pass.
    """
    passes = math.ceil(rows / micro_batch)
    collectives = 3 * passes if stage == 3 else 2
    link = gpu.inside if gpus <= gpu.servers else gpu.outside
    moved = 2 * parameters * (gpus - 1) / gpus
    communication = collectives * (moved / link + math.log2(gpus) * HOP)
    held = states(parameters, TrainConfig(precision="bf16", zero_stage=stage), gpus)
    together = min(rows, micro_batch)
    logits = 2 * 4 * min(CHUNK_LOGITS["cuda"], together * logits_of_a_row)
    memory = held.total + logits + together * kept_of_a_row
    return Prediction(
        gpus=gpus,
        rows=rows,
        compute=rows * flops_of_a_row / (gpu.flops * share),
        communication=communication,
        optimiser=2 * (held.optimiser + held.ema) / gpu.bandwidth,
        memory=memory,
    )


def break_even(recipe: Recipe, gpu: Gpu, share: float, gpus: int) -> float:
    """Rows a GPU below which communication takes longer than computing."""
    found = predict(recipe.parameters, recipe.flops_of_a_row, 0.0, 0.0, 1.0, gpus, gpu, share)
    return found.communication / found.compute


def kept_of_a_row(recipe: Recipe) -> float:
    """Bytes of activations of a row, from `KEPT`."""
    model = recipe.model
    blocks = (
        model.blocks if isinstance(model, MDLMConfig) else model.encoder_blocks + model.decoder_blocks + 1
    )
    return KEPT * blocks * model.hidden * recipe.length


def table(
    recipe: Recipe, gpu: Gpu, share: float, batch: int | None, rows: int | None, stage: Stage = 1
) -> list[str]:
    """Markdown rows for 1 to 1,024 GPUs, of one `batch` whatever their number, or of `rows` rows a GPU."""
    lines = [
        "| GPUs | rows a GPU | compute ms | communication ms | optimiser ms | step ms | sequences/s | efficiency "
        "| GB a GPU | largest term |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    facts = recipe.parameters, recipe.flops_of_a_row, kept_of_a_row(recipe), recipe.vocabulary * recipe.length
    for gpus in _COUNTS:
        each = batch / gpus if batch is not None else float(rows or 1)
        if each < 1:
            continue  # a row is on one GPU
        found = predict(*facts, each, gpus, gpu, share, stage)
        lines.append(
            f"| {gpus:,} | {each:g} | {found.compute * 1e3:,.1f} | {found.communication * 1e3:,.1f} "
            f"| {found.optimiser * 1e3:.1f} | {found.step * 1e3:,.1f} | {each * gpus / found.step:,.0f} "
            f"| {found.efficiency:.0%} | {found.memory / 1e9:.1f} | {found.largest} |"
        )
    return lines


def report() -> str:
    """All tables of the page on scaling."""
    lines: list[str] = []
    for recipe in (PGM_8_8, PGM_6_6):
        lines += [
            f"**{recipe.name}**: {recipe.parameters / 1e6:.1f}M parameters, "
            f"{recipe.flops_of_a_row / 1e12:.2f} TFLOP a row; {recipe.measured} sequences/s on an A100 are "
            f"{recipe.share:.0%} of its peak.",
            "",
        ]
    lines += ["Rows a GPU in a step below which communication outlasts computing, ZeRO 1:", ""]
    lines += ["| | 8 GPUs | 64 GPUs | 1,024 GPUs |", "|---|---:|---:|---:|"]
    for recipe in (PGM_8_8, PGM_6_6):
        for gpu in (A100, A100_ETHERNET, H100):
            found = (f"{break_even(recipe, gpu, recipe.share, gpus):.2g}" for gpus in (8, 64, 1024))
            lines.append(f"| {recipe.name} on {gpu.name} | {' | '.join(found)} |")
    lines.append("")
    for recipe, gpu, batch, rows, stage in _TABLES:
        spread = f"{batch} rows a step, however many GPUs" if batch else f"{rows} rows a GPU"
        title = f"{recipe.name} on {gpu.name}, {spread}, ZeRO {stage}, at {recipe.share:.0%} of the peak"
        lines += [f"### {title}", "", *table(recipe, gpu, recipe.share, batch, rows, stage), ""]
    return "\n".join(lines)


_COUNTS = (1, 4, 8, 16, 64, 128, 256, 512, 1024)
_TABLES: tuple[tuple[Recipe, Gpu, int | None, int | None, Stage], ...] = (
    (PGM_8_8, A100, 512, None, 1),
    (PGM_8_8, A100, None, 32, 1),
    (PGM_8_8, A100, None, 32, 3),
    (PGM_8_8, A100_ETHERNET, 512, None, 1),
    (PGM_8_8, A100_ETHERNET, None, 32, 1),
    (PGM_8_8, H100, 512, None, 1),
    (PGM_6_6, A100, 512, None, 1),
)

if __name__ == "__main__":
    print(report())  # noqa: T201
