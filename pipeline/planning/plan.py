"""What a run would need and cost, before anything is started: parameters, memory of a GPU, arithmetic, time.

Nothing here is measured on the machine and nothing is written. Parameters are counted on the model itself, built
without storage; states follow from how DeepSpeed lays them out; activations are an estimate, whose formula is told.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool

from pipeline.config.schema import RunConfig, TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.data.tokenizers import load_tokenizer
from pipeline.diffusion import partition
from pipeline.errors import ConfigError, did_you_mean
from pipeline.models import build
from pipeline.models.denoiser import Denoiser
from pipeline.models.flops import flops, training_work
from pipeline.models.layers import CHUNK_LOGITS
from pipeline.models.model_folder import DataFacts

SHARE_OF_PEAK = 0.35  # of the dense peak that a step is assumed to reach
RESERVE = 0.9  # share of a GPU's memory that tensors can have; the rest is CUDA's and fragmentation
# Bytes that a block keeps for every token and unit of width, with dropout; counted on saved tensors.
KEPT = {"fp32": 92, "bf16": 52}
_ROWS = 512  # rows whose groups are drawn for the mean sizes of segments


@dataclass(frozen=True)
class GPU:
    """One GPU type; rates in dense TFLOP/s, without sparsity."""

    memory_gib: float
    bf16: float
    fp32: float  # without TF32, as torch computes by default


# Source: NVIDIA's data sheets of the products (L4, A10, L40S, RTX 4090 Ada whitepaper, A100, H100, H200, HGX B200).
GPUS = {
    "l4": GPU(24, 121, 30.3),
    "a10": GPU(24, 125, 31.2),
    "rtx4090": GPU(24, 165, 82.6),
    "l40s": GPU(48, 362, 91.6),
    "a100-40gb": GPU(40, 312, 19.5),
    "a100-80gb": GPU(80, 312, 19.5),
    "h100": GPU(80, 989, 67),
    "h200": GPU(141, 989, 67),
    "b200": GPU(180, 2250, 80),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step."""

    weights: float
    gradients: float
    optimiser: float
    ema: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.ema + self.activations


def chosen(name: str) -> Mapping[str, GPU]:
    """The GPU types that `plan=NAME` means; "true" means all.

    Raises:
        ConfigError: there is no such type in the table.
    """
    if name.lower() == "true":
        return GPUS
    if name.lower() not in GPUS:
        raise ConfigError(
            f"plan: {name!r} is no GPU in the table{did_you_mean(name.lower(), GPUS)}; "
            f"known: {', '.join(GPUS)}, or true for all"
        )
    return {name.lower(): GPUS[name.lower()]}


def data_facts(config: RunConfig) -> DataFacts | None:
    """What the model will be told about its data; None where only preparing it can say (a tokenizer's file).

    Raises:
        ConfigError: no such tokenizer.
    """
    data = config.data
    if data.kind == "text":
        tokenizer = load_tokenizer(data.tokenizer)
        bos = tokenizer.eot if data.wrap == "bos_eos" else None
        return DataFacts(tokenizer.vocab_size, data.length, bos, tokenizer.eot)
    if data.tokenizer == "patch":
        return DataFacts(data.codes, data.length, data.codes + 1, None)
    return None


def empty_model(config: RunConfig, facts: DataFacts) -> Denoiser:
    """The run's model without storage for its parameters."""
    with torch.device("meta"):
        return build(config.model, facts.vocab_size, facts.length, facts.bos)


def parameters(config: RunConfig, facts: DataFacts) -> dict[str, int]:
    """Numbers of parameters by part of the model, exactly."""
    model = empty_model(config, facts)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()} | {
        name: p.numel() for name, p in model.named_parameters(recurse=False)
    }


def states(count: int, train: TrainConfig, workers: int, kept_whole: int = 0) -> Memory:
    """Bytes of weights, gradients, optimiser and average on one GPU; activations 0.

    Per parameter, in float32: weights 4, gradients 4, Adam's moments 8, average 4, and from stage 1 on a float32
    copy of the weights, 4. In bf16: weights 2, gradients 2, float32 weights 4, moments 8, average 4. Stage 1
    divides optimiser and average by the workers, stage 2 gradients too, stage 3 weights too. Offloaded, optimiser
    and average are on the host.

    Args:
        count: parameters.
        kept_whole: of them, those in tensors of fewer values than `train.persistent_parameters` (stage 3).
    """
    stage, low = train.zero_stage, 4 if train.precision == "fp32" else 2
    masters = 0 if stage == 0 and train.precision == "fp32" else 4
    shared = workers if stage >= 1 else 1
    return Memory(
        weights=count * low if stage < 3 else kept_whole * low + (count - kept_whole) * low / workers,
        gradients=count * low / (workers if stage >= 2 else 1),
        optimiser=0 if train.offload_optimizer else count * (8 + masters) / shared,
        ema=0 if train.offload_optimizer else count * 4 / shared,
        activations=0,
    )


def _groups(config: RunConfig, facts: DataFacts) -> Bool[np.ndarray, "B L"]:
    """Groups of some rows, drawn as training draws them."""
    shape = (_ROWS, facts.length)
    bos = facts.bos is not None
    return partition.draw(config.diffusion, seed=config.seed, step=0, shape=shape, bos=bos).groups


def forward_flops(config: RunConfig, facts: DataFacts) -> float:
    """Floating-point operations of one row's forward pass: 2 for each multiply-add of the matrix products."""
    return flops(training_work(config.model, facts.vocab_size, _groups(config, facts))) / _ROWS


def step_flops(config: RunConfig, facts: DataFacts) -> float:
    """Of one update of the global batch: forward, backward (twice forward), and what recomputing adds.

    A distillation adds the teacher's two rollout steps, each about a forward pass.
    """
    forward = forward_flops(config, facts)
    again = 1 if config.train.activation_checkpointing else 0
    teacher = 2 if config.distill is not None else 0
    return config.train.batch * forward * (3 + again + teacher)


def activations(config: RunConfig, facts: DataFacts) -> float:
    """Bytes that the backward pass of one micro-batch needs, an estimate.

    For every token that a block or a swap runs, it keeps about 92 H bytes in float32 and 52 H in bf16, where norms
    and rotations still work in float32; with recomputing one vector a block, and all of one block. The loss holds
    up to three chunks of 2^27 float32 logits.
    """
    model, train = config.model, config.train
    rows = min(train.micro_batch, train.batch)
    each = model.hidden * KEPT[train.precision]
    encoded, asked = float(facts.length + model.registers), float(facts.length - (facts.bos is not None))
    if model.kind == "pgm":
        swaps = model.decoder_blocks if model.swap.every_block else 1
        runs = [encoded] * model.encoder_blocks + [asked] * (model.decoder_blocks + swaps)
    else:
        if model.kind == "mdlm":
            encoded *= 2 if model.complementary else 1
            asked = asked if model.complementary else float(_groups(config, facts).sum(1).mean())
        runs = [encoded] * model.blocks
    kept = sum(runs) * each
    if train.activation_checkpointing:
        kept = sum(runs) * model.hidden * (4 if train.precision == "fp32" else 2) + max(runs) * each
    return rows * kept + 3 * 4 * min(rows * asked * facts.vocab_size, CHUNK_LOGITS["cuda"])


def report(
    config: RunConfig, gpus: Mapping[str, GPU], manifest: Manifest | None, there: Mapping[str, float]
) -> str:
    """The plan in words, for people.

    Args:
        gpus: types to tell memory and time of, from `chosen`.
        manifest: of the prepared data; None: not prepared yet.
        there: resources ("CPU", "GPU") of the cluster, or of this machine.

    Raises:
        ConfigError: only preparing the data tells how many codes there are.
    """
    facts, train, rows = data_facts(config), config.train, None
    if manifest is not None:
        rows, special = manifest.rows("train"), manifest.special
        facts = DataFacts(manifest.vocabulary, manifest.length, special.bos, special.eot)
    if facts is None:
        raise ConfigError(
            f"data.tokenizer: {config.data.tokenizer!r} must be read to know how many codes there are; "
            "prepare the data first (`python -m jobs.prepare CONFIG`)"
        )
    counts = parameters(config, facts)
    total, workers = sum(counts.values()), config.cluster.most
    tokens = train.steps * train.batch * facts.length
    parts = -(-train.batch // (workers * train.micro_batch))
    needed = step_flops(config, facts)
    lines = [
        f"parameters   {total:,} ({', '.join(f'{name} {n:,}' for name, n in counts.items() if n)})",
        f"tokens       {tokens:,} in {train.steps:,} steps of {train.batch} rows of {facts.length}",
        "epochs       "
        + (
            f"{train.steps * train.batch / rows:,.2f} of {rows:,} training rows"
            if rows
            else "unknown until the data is prepared"
        ),
        f"workers      {workers}, each {parts} micro-batches of up to {train.micro_batch} rows a step; "
        f"{config.data.streams} streams of data",
        f"arithmetic   {needed:.3g} FLOPs a step, {needed * train.steps:.3g} in all",
        "",
        f"memory of one GPU, GiB, {train.precision} (the run's: ZeRO stage {train.zero_stage})",
        "  stage  weights  gradients  optimiser    EMA  activations (estimate)  all",
    ]
    for stage in (0, 1, 2, 3):
        m = memory(config, facts, stage)
        gib = [
            value / 2**30 for value in (m.weights, m.gradients, m.optimiser, m.ema, m.activations, m.total)
        ]
        lines.append(
            "{:>7}  {:7.2f}  {:9.2f}  {:9.2f}  {:5.2f}  {:22.2f}  {:.2f}".format(
                f"{stage}{'*' if stage == train.zero_stage else ''}", *gib
            )
        )
    need = memory(config, facts, train.zero_stage).total
    lines += [
        "",
        f"time at {SHARE_OF_PEAK:.0%} of each type's dense {train.precision} peak, on {workers} GPUs",
    ]
    for name, gpu in gpus.items():
        seconds = needed / (
            workers * SHARE_OF_PEAK * 1e12 * (gpu.bf16 if train.precision == "bf16" else gpu.fp32)
        )
        fits = "fits" if need <= RESERVE * gpu.memory_gib * 2**30 else "DOES NOT FIT"
        lines.append(
            f"  {name:<10} {seconds:9.3g} s a step, {seconds * train.steps / 3600:9.3g} hours; "
            f"{need / 2**30:.1f} of {gpu.memory_gib:g} GiB: {fits}"
        )
    return "\n".join([*lines, "", *_against(config, workers, there)])


def memory(config: RunConfig, facts: DataFacts, stage: int) -> Memory:
    """Of one GPU, had the run this ZeRO stage."""
    train = config.train.model_copy(update={"zero_stage": stage})
    counts = [parameter.numel() for parameter in empty_model(config, facts).parameters()]
    whole = sum(count for count in counts if count < train.persistent_parameters)
    kept = states(sum(counts), train, config.cluster.most, whole)
    teacher = 0.0 if config.distill is None else sum(counts) * (4 if train.precision == "fp32" else 2)
    return replace(kept, weights=kept.weights + teacher, activations=activations(config, facts))


def _against(config: RunConfig, workers: int, there: Mapping[str, float]) -> list[str]:
    """Resources asked for beside those there."""
    asked = {"GPU": 0 if config.cluster.accelerator == "cpu" else workers}
    asked["CPU"] = workers * config.cluster.cpus_per_worker
    lines = []
    for name, count in asked.items():
        have = there.get(name, 0)
        verdict = "enough" if have >= count else f"{count - have:g} TOO FEW"
        if name == "GPU" and config.cluster.accelerator == "auto" and have < count:
            verdict = "one machine takes CPUs, a cluster refuses the run" if have else "the run takes CPUs"
        lines.append(f"{name}s         {count} asked for, {have:g} there: {verdict}")
    return lines
