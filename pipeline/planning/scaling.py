"""Predict step time, memory and communication of training on 1 to 1,024 GPUs.

`python -m pipeline.planning.scaling` prints the tables of docs/scaling.md. They follow from the operations, bytes and
launches of a step and from published rates of GPUs and links. Nothing was run on a GPU.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config.model import PGMConfig
from pipeline.config.schema import RunConfig, TrainConfig
from pipeline.models.model_folder import DataFacts
from pipeline.models.released.architecture import GPT2_VOCABULARY
from pipeline.planning import plan
from pipeline.planning.gpus import GPU, GPUS
from pipeline.planning.memory import Activations, states
from pipeline.planning.step_time import MicroBatch
from pipeline.reports.tables import markdown, table_of

Stage = Literal[0, 1, 2, 3]

MICRO_BATCH = 32  # rows
TRAIN = TrainConfig(precision="bf16", micro_batch=MICRO_BATCH)
HOP = 10e-6  # seconds of a message to the next GPU, an assumption; matters for small models on many GPUs only


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
    """What is trained, in bf16.

    Attributes:
        name: as shown in tables.
        parameters: number of parameters.
        row_flops: floating-point operations of a row's forward and backward pass.
        activations: memory of a micro-batch.
        micro_batch: what a micro-batch of so many rows asks of a GPU.
        published: rows per second of the authors' code on one A100.
    """

    name: str
    parameters: int
    row_flops: float
    activations: Activations
    micro_batch: Callable[[float], MicroBatch]
    published: float

    def seconds(self, gpu: GPU, rows: float) -> float:
        """Predict the forward and backward passes of a GPU's rows, in micro-batches of at most 32.

        Args:
            gpu: its rates.
            rows: rows per step.
        """
        parts = math.ceil(rows / MICRO_BATCH)
        return parts * sum(self.micro_batch(rows / parts).seconds(gpu).values())


def paper_workloads() -> tuple[Workload, Workload]:
    """Describe PGM 8/8 and PGM 6/6, with the throughput that the authors report for their code at batch 32.

    Source:
        arXiv 2505.18883.
    """
    return _workload(8, 768, 12, published=68.0), _workload(6, 1024, 16, published=62.9)


def _workload(blocks: int, hidden: int, heads: int, published: float) -> Workload:
    """Count parameters, operations and activations of a PGM on OpenWebText in GPT-2 tokens."""
    model = PGMConfig(encoder_blocks=blocks, decoder_blocks=blocks, hidden=hidden, heads=heads)
    config = RunConfig(name="scaling", model=model, train=TRAIN)
    facts = DataFacts(GPT2_VOCABULARY, 1024, None, None)
    return Workload(
        name=f"PGM {blocks}/{blocks}, H {hidden}",
        parameters=sum(plan.parameters(config, facts).values()),
        row_flops=3 * plan.forward_flops(config, facts),
        activations=plan.step_activations(config, facts),
        micro_batch=plan.step_work(config, facts),
        published=published,
    )


@dataclass(frozen=True)
class Prediction:
    """One training step; times in seconds.

    Attributes:
        compute: forward and backward passes.
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


def predict(workload: Workload, server: Server, gpus: int, rows: float, stage: Stage = 1) -> Prediction:
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
    train = TRAIN.model_copy(update={"zero_stage": stage})
    collectives = 3 * math.ceil(rows / MICRO_BATCH) if stage == 3 else 2
    link = 1e9 * (server.gpu.link if gpus <= server.size else server.network)
    moved = 2 * workload.parameters * (gpus - 1) / gpus
    held = states(workload.parameters, train, gpus)
    return Prediction(
        compute=workload.seconds(server.gpu, rows),
        communication=collectives * (moved / link + math.log2(gpus) * HOP),
        optimiser=2 * (held.optimiser + held.ema) / (server.gpu.bandwidth * 1e9),
        memory=held.total + workload.activations.peak(min(rows, MICRO_BATCH)),
    )


def break_even(workload: Workload, server: Server, gpus: int) -> float:
    """Compute the rows per GPU below which communication takes longer than computing.

    Args:
        workload: what is trained, with ZeRO 1.
        server: the type of all servers.
        gpus: number of GPUs.

    Returns:
        The number of rows, in general not whole, and at most 1,000; 0 where communication is always shorter, since
        computing takes at least as long as its launches.
    """
    communication = predict(workload, server, gpus, rows=1.0).communication
    low, high = 1e-3, 1e3
    if workload.seconds(server.gpu, low) >= communication:
        return 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if workload.seconds(server.gpu, middle) < communication else (low, middle)
    return low


def report() -> str:
    """Write all tables of docs/scaling.md."""
    workloads = pgm_8_8, pgm_6_6 = paper_workloads()
    models = [
        {
            "Model": work.name,
            "Parameters, M": f"{work.parameters / 1e6:.1f}",
            "TFLOP per row": f"{work.row_flops / 1e12:.2f}",
            "Sequences/s, A100, published": f"{work.published}",
            "Predicted, A100": f"{32 / work.seconds(A100.gpu, 32):.0f}",
            "Predicted, H100": f"{32 / work.seconds(H100.gpu, 32):.0f}",
            "Share of peak, A100": f"{_share(work, A100.gpu):.0%}",
            "Share of peak, H100": f"{_share(work, H100.gpu):.0%}",
            "Activations, GB per row": f"{work.activations.per_row / 1e9:.2f}",
        }
        for work in workloads
    ]
    limits = [
        {"Model": work.name, "Server": server.name}
        | {f"{gpus:,} GPUs": f"{break_even(work, server, gpus):.2g}" for gpus in (8, 64, 1024)}
        for work in workloads
        for server in (A100, A100_ETHERNET, H100)
    ]
    blocks = [
        markdown(table_of(models)),
        "### Rows per GPU below which communication takes longer than computing, ZeRO 1",
        markdown(table_of(limits)),
    ]
    tables: tuple[tuple[Workload, Server, int | None, Stage], ...] = (
        (pgm_8_8, A100, 512, 1),
        (pgm_8_8, A100, None, 1),
        (pgm_8_8, A100, None, 3),
        (pgm_8_8, A100_ETHERNET, 512, 1),
        (pgm_8_8, A100_ETHERNET, None, 1),
        (pgm_8_8, H100, 512, 1),
        (pgm_6_6, A100, 512, 1),
    )
    for work, server, batch, stage in tables:
        spread = f"{batch} rows per step" if batch else "32 rows per GPU"
        blocks.append(f"### {work.name} on {server.name}, {spread}, ZeRO {stage}")
        blocks.append(markdown(table_of(_steps(work, server, batch=batch, stage=stage))))
    return "\n\n".join(blocks)


def _share(workload: Workload, gpu: GPU) -> float:
    """Share of a GPU's peak rate that micro-batches of 32 rows reach."""
    return 32 * workload.row_flops / (workload.seconds(gpu, 32) * gpu.bf16 * 1e12)


def _steps(workload: Workload, server: Server, batch: int | None, stage: Stage) -> Iterator[dict[str, str]]:
    """Predict steps on 1 to 1,024 GPUs that share a batch, or that take 32 rows each."""
    for gpus in (1, 4, 8, 16, 64, 128, 256, 512, 1024):
        rows = batch / gpus if batch is not None else 32.0
        if rows < 1:
            continue  # a row is not split over GPUs
        step = predict(workload, server, gpus, rows=rows, stage=stage)
        yield {
            "GPUs": f"{gpus:,}",
            "Rows per GPU": f"{rows:g}",
            "Compute, ms": f"{step.compute * 1e3:,.1f}",
            "Communication, ms": f"{step.communication * 1e3:,.1f}",
            "Optimiser, ms": f"{step.optimiser * 1e3:.1f}",
            "Step, ms": f"{step.step * 1e3:,.1f}",
            "Sequences/s": f"{rows * gpus / step.step:,.0f}",
            "Efficiency": f"{step.efficiency:.0%}",
            "GB per GPU": f"{step.memory / 1e9:.1f}",
            "Largest term": step.largest,
        }


if __name__ == "__main__":
    print(report())  # noqa: T201
