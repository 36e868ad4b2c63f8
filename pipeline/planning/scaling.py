"""Predict step time, memory and communication of training on 1 to 1,024 GPUs.

`python -m pipeline.planning.scaling` prints the tables of docs/scaling.md. They follow from the operations of a step,
published rates of GPUs and links, and one measured number: the share of a GPU's peak that training reaches. Nothing
was run on that many GPUs.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pipeline.config.schema import PGMConfig, RunConfig, TrainConfig
from pipeline.models.model_folder import DataFacts
from pipeline.planning import plan
from pipeline.planning.gpus import GPU, GPUS
from pipeline.planning.memory import Activations, states

Stage = Literal[0, 1, 2, 3]

HOP = 10e-6  # seconds of a message to the next GPU, an assumption; matters for small models on many GPUs only
_FACTS = DataFacts(50_257, 1024, None, None)  # OpenWebText in GPT-2 tokens


@dataclass(frozen=True)
class Server:
    """A type of server.

    Attributes:
        name: as shown in tables.
        gpu: its GPUs.
        network: all network adapters of the server together, in one direction, GB/s.
        size: number of GPUs.
    """

    name: str
    gpu: GPU
    network: float
    size: int = 8


# Source: NVIDIA's data sheets of the DGX A100 (8 adapters of 200 Gb/s) and the DGX H100 (8 of 400 Gb/s).
A100 = Server("A100 80GB", GPUS["a100-80gb"], network=8 * 25)
# The same GPUs behind one 100 Gb/s Ethernet adapter, as clouds without InfiniBand rent them.
A100_ETHERNET = Server("A100 80GB, 100 Gb/s per server", GPUS["a100-80gb"], network=12.5)
H100 = Server("H100 80GB", GPUS["h100"], network=8 * 50)


@dataclass(frozen=True)
class Workload:
    """What training one row costs.

    Attributes:
        parameters: number of parameters of the model.
        row_flops: floating-point operations of a row's forward and backward pass.
        activations: memory of a micro-batch.
        share: of the GPU's peak rate that training reaches.
    """

    parameters: int
    row_flops: float
    activations: Activations
    share: float


@dataclass(frozen=True)
class Recipe:
    """A model of the paper, trained in bf16.

    Attributes:
        name: as shown in tables.
        model: its architecture.
        rows_per_second: throughput of one A100 at batch 32, as arXiv 2505.18883 reports of the authors' code.
    """

    name: str
    model: PGMConfig
    rows_per_second: float

    @cached_property
    def workload(self) -> Workload:
        """Count parameters, operations and activations; the share follows from the reported throughput."""
        config = RunConfig(name="scaling", model=self.model, train=TrainConfig(precision="bf16"))
        row_flops = 3 * plan.forward_flops(config, _FACTS)
        return Workload(
            parameters=sum(plan.parameters(config, _FACTS).values()),
            row_flops=row_flops,
            activations=plan.step_activations(config, _FACTS),
            share=self.rows_per_second * row_flops / (A100.gpu.bf16 * 1e12),
        )


PGM_8_8 = Recipe("PGM 8/8, H 768", PGMConfig(encoder_blocks=8, decoder_blocks=8, hidden=768, heads=12), 68.0)
PGM_6_6 = Recipe(
    "PGM 6/6, H 1024", PGMConfig(encoder_blocks=6, decoder_blocks=6, hidden=1024, heads=16), 62.9
)


@dataclass(frozen=True)
class Prediction:
    """One training step; times in seconds.

    Attributes:
        compute: forward and backward pass at the reached share of the peak.
        communication: gradients and weights, not overlapped with anything.
        optimiser: reading and writing a GPU's part of the optimiser's state.
        memory: bytes per GPU.
    """

    compute: float
    communication: float
    optimiser: float
    memory: float

    @property
    def step(self) -> float:
        """Total time of the step."""
        return self.compute + self.communication + self.optimiser

    @property
    def largest(self) -> str:
        """Name of the term that takes longest."""
        return max(("compute", "communication", "optimiser"), key=lambda name: getattr(self, name))

    @property
    def efficiency(self) -> float:
        """Sequences per second and GPU, relative to a GPU that only computes."""
        return self.compute / self.step


def predict(
    workload: Workload,
    server: Server,
    gpus: int,
    rows: float,
    stage: Stage = 1,
) -> Prediction:
    """Predict one training step in bf16 with micro-batches of 32 rows.

    Communication is a ring's: a reduce-scatter or an all-gather of b bytes over n GPUs moves b (n - 1) / n through
    every link. Stages 0 to 2 need two of them per step (gradients, then weights). Stage 3 needs a third one (weights
    again in the backward pass) and all three for every micro-batch. A value takes two bytes.

    Args:
        workload: what is trained.
        server: the type of all servers.
        gpus: number of GPUs.
        rows: rows per GPU and step.
        stage: ZeRO stage.

    Returns:
        Times and memory of one GPU.
    """
    train = TrainConfig(precision="bf16", zero_stage=stage)
    collectives = 3 * math.ceil(rows / train.micro_batch) if stage == 3 else 2
    link = 1e9 * (server.gpu.link if gpus <= server.size else server.network)
    moved = 2 * workload.parameters * (gpus - 1) / gpus
    held = states(workload.parameters, train, gpus)
    return Prediction(
        compute=rows * workload.row_flops / (server.gpu.bf16 * 1e12 * workload.share),
        communication=collectives * (moved / link + math.log2(gpus) * HOP),
        optimiser=2 * (held.optimiser + held.ema) / (server.gpu.bandwidth * 1e9),
        memory=held.total + workload.activations.peak(min(rows, train.micro_batch)),
    )


def break_even(workload: Workload, server: Server, gpus: int) -> float:
    """Compute the rows per GPU below which communication takes longer than computing.

    Args:
        workload: what is trained, with ZeRO 1.
        server: the type of all servers.
        gpus: number of GPUs.

    Returns:
        The number of rows, in general not whole.
    """
    prediction = predict(workload, server, gpus, rows=1.0)
    return prediction.communication / prediction.compute


def report() -> str:
    """Write all tables of docs/scaling.md."""
    recipes = (PGM_8_8, PGM_6_6)
    lines = [
        "| Model | Parameters | TFLOP per row | Sequences/s, A100 | Share of peak | Activations, GB per row |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for recipe in recipes:
        work = recipe.workload
        lines.append(
            f"| {recipe.name} | {work.parameters / 1e6:.1f}M | {work.row_flops / 1e12:.2f} "
            f"| {recipe.rows_per_second} | {work.share:.0%} | {work.activations.per_row / 1e9:.2f} |"
        )
    lines += ["", "### Rows per GPU below which communication takes longer than computing, ZeRO 1", ""]
    lines += ["| Model | Server | 8 GPUs | 64 GPUs | 1,024 GPUs |", "|---|---|---:|---:|---:|"]
    for recipe in recipes:
        for server in (A100, A100_ETHERNET, H100):
            rows = (f"{break_even(recipe.workload, server, gpus):.2g}" for gpus in (8, 64, 1024))
            lines.append(f"| {recipe.name} | {server.name} | {' | '.join(rows)} |")
    for recipe, server, batch, stage in _TABLES:
        spread = f"{batch} rows per step" if batch else "32 rows per GPU"
        share = f"{recipe.workload.share:.0%} of the peak"
        lines += ["", f"### {recipe.name} on {server.name}, {spread}, ZeRO {stage}, {share}", ""]
        lines += _table(recipe.workload, server, batch, stage)
    return "\n".join(lines)


def _table(workload: Workload, server: Server, batch: int | None, stage: Stage) -> list[str]:
    """Write Markdown rows for 1 to 1,024 GPUs that share a batch, or that take 32 rows each."""
    lines = [
        "| GPUs | Rows per GPU | Compute, ms | Communication, ms | Optimiser, ms | Step, ms | Sequences/s "
        "| Efficiency | GB per GPU | Largest term |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for gpus in (1, 4, 8, 16, 64, 128, 256, 512, 1024):
        rows = batch / gpus if batch is not None else 32.0
        if rows < 1:
            continue  # a row is not split over GPUs
        step = predict(workload, server, gpus, rows, stage)
        lines.append(
            f"| {gpus:,} | {rows:g} | {step.compute * 1e3:,.1f} | {step.communication * 1e3:,.1f} "
            f"| {step.optimiser * 1e3:.1f} | {step.step * 1e3:,.1f} | {rows * gpus / step.step:,.0f} "
            f"| {step.efficiency:.0%} | {step.memory / 1e9:.1f} | {step.largest} |"
        )
    return lines


_TABLES: tuple[tuple[Recipe, Server, int | None, Stage], ...] = (
    (PGM_8_8, A100, 512, 1),
    (PGM_8_8, A100, None, 1),
    (PGM_8_8, A100, None, 3),
    (PGM_8_8, A100_ETHERNET, 512, 1),
    (PGM_8_8, A100_ETHERNET, None, 1),
    (PGM_8_8, H100, 512, 1),
    (PGM_6_6, A100, 512, 1),
)

if __name__ == "__main__":
    print(report())  # noqa: T201
