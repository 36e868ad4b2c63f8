"""Predict what a run needs before it starts: parameters, memory of a GPU, arithmetic and time.

Nothing is measured and nothing is written. Parameters are counted on the model itself, built without storage for
them. Model states follow from how DeepSpeed lays them out, activations from `pipeline.planning.memory`, times from
`pipeline.planning.step_time`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from pipeline.config.schema import RunConfig, TrainConfig
from pipeline.data.manifest import Manifest, SpecialIds
from pipeline.data.tokenizers import load_tokenizer
from pipeline.diffusion import partition
from pipeline.errors import ConfigError
from pipeline.models import build
from pipeline.models.adapters.lora import UP, adapt
from pipeline.models.denoiser import Denoiser
from pipeline.models.flops import flops, training_work
from pipeline.models.model_folder import DataFacts
from pipeline.planning import step_time
from pipeline.planning.gpus import GPU
from pipeline.planning.memory import Activations, Memory, activations, sampling_caches, states
from pipeline.reports.tables import aligned, table_of

RESERVE = 0.9  # share of a GPU's memory that tensors can have; the rest is CUDA's and fragmentation
_ROWS = 512  # rows whose groups are drawn for mean sizes of segments


def data_facts(config: RunConfig) -> DataFacts | None:
    """Read vocabulary, length and special ids from the config.

    Args:
        config: the run's config.

    Returns:
        The facts, or None for images whose tokenizer must be read first, which preparing the data does.

    Raises:
        ConfigError: there is no such text tokenizer.
    """
    data = config.data
    if data.kind == "text":
        if data.fitted is not None:
            eot = data.fitted - 1
            return DataFacts(data.fitted, data.length, eot if data.wrap == "bos_eos" else None, eot)
        tokenizer = load_tokenizer(data.tokenizer)
        special = SpecialIds.of_text(data, tokenizer)
        return DataFacts(tokenizer.vocab_size, data.length, special.bos, special.eot, pad=special.pad)
    if data.kind == "pair":
        if data.tokenizer != "patch":
            return None
        text = load_tokenizer(data.text_tokenizer).vocab_size if data.fitted is None else data.fitted
        facts = DataFacts(text + data.codes, data.length, None, None)
        return replace(facts, caption=data.caption_length, text_ids=text)
    if data.tokenizer == "patch":
        return DataFacts(data.codes, data.length, data.codes + 1, None)
    return None


def parameters(config: RunConfig, facts: DataFacts) -> dict[str, int]:
    """Count the parameters exactly.

    Args:
        config: the run's config.
        facts: vocabulary and length of its data.

    Returns:
        The number of parameters of each part of the model.
    """
    model = _empty_model(config, facts)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()} | {
        name: p.numel() for name, p in model.named_parameters(recurse=False)
    }


def forward_flops(config: RunConfig, facts: DataFacts) -> float:
    """Count the floating-point operations of one row's forward pass, two for each multiply-add.

    Args:
        config: the run's config.
        facts: vocabulary and length of its data.

    Returns:
        The mean over random groups.
    """
    return flops(training_work(config.model, facts.vocab_size, _groups(config, facts))) / _ROWS


def row_flops(config: RunConfig, facts: DataFacts) -> float:
    """Count the floating-point operations that an update needs for one row.

    The backward pass costs two forward passes. Distillation adds the teacher's two rollout steps, each about a
    forward pass.

    Args:
        config: the run's config.
        facts: vocabulary and length of its data.

    Returns:
        The mean over random groups.
    """
    return forward_flops(config, facts) * (3 + (2 if config.distill is not None else 0))


def step_flops(config: RunConfig, facts: DataFacts) -> float:
    """Count the floating-point operations of one update of the global batch, as `row_flops`.

    Activation checkpointing computes one forward pass more.

    Args:
        config: the run's config.
        facts: vocabulary and length of its data.

    Returns:
        The operations of all workers together.
    """
    again = forward_flops(config, facts) if config.train.activation_checkpointing else 0.0
    return config.train.batch * (row_flops(config, facts) + again)


def step_work(config: RunConfig, facts: DataFacts) -> Callable[[float], step_time.MicroBatch]:
    """Count what the forward and the backward pass of micro-batches ask of a GPU, with mean sizes of segments.

    The teacher of a distillation is not counted.

    Args:
        config: the run's config.
        facts: vocabulary and length of its data.

    Returns:
        A function from the rows of a micro-batch to its operations, bytes and launches.
    """
    return step_time.count(config.model, facts.vocab_size, _groups(config, facts), config.train)


def step_activations(config: RunConfig, facts: DataFacts) -> Activations:
    """Count what the backward pass of the run's micro-batches needs.

    Args:
        config: the run's config.
        facts: vocabulary and length of its data.

    Returns:
        The bytes per row and per micro-batch.
    """
    targets = float(facts.length - (facts.bos is not None))
    if config.model.kind == "mdlm" and not config.model.complementary:
        targets = float(_groups(config, facts).sum(1).mean())  # only masked positions are predicted
    return activations(config.model, facts, config.train, targets=targets)


def memory(config: RunConfig, facts: DataFacts, stage: int) -> Memory:
    """Predict the memory of one GPU.

    Args:
        config: the run's config.
        facts: vocabulary and length of its data.
        stage: ZeRO stage, in place of the config's.

    Returns:
        The bytes of each part.
    """
    train = config.train.model_copy(update={"zero_stage": stage})
    model, workers = _empty_model(config, facts), config.cluster.most
    value = 2 if train.precision == "bf16" else 4
    copies, extra = 0, 0.0
    if config.distill is not None:  # the teacher
        extra = sum(p.numel() for p in model.parameters()) * value
    if config.model.lora is not None:
        adapt(model, config.model.lora)
        frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
        extra = states(sum(frozen), train, workers, _whole(frozen, train)).weights
        # Adapted weights are kept for the backward pass, unless it computes them again.
        layers: list[Any] = [part for part in model.modules() if hasattr(part, UP)]
        adapted = sum(layer.weight.numel() for layer in layers)
        copies = 0 if train.activation_checkpointing else adapted * value
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    held = states(sum(trained), train, workers, _whole(trained, train))
    peak = step_activations(config, facts).peak(min(train.rows_at_once(facts.length), train.batch))
    return replace(held, weights=held.weights + extra, activations=peak + copies)


def _whole(counts: Sequence[int], train: TrainConfig) -> int:
    """Count the values of parameters that stay whole on every GPU in stage 3."""
    return sum(count for count in counts if count < train.persistent_parameters)


def report(
    config: RunConfig, gpus: Mapping[str, GPU], manifest: Manifest | None, available: Mapping[str, float]
) -> str:
    """Write the plan as text.

    Args:
        config: the run's config.
        gpus: types whose memory and time are shown, from `select_gpus`.
        manifest: of the prepared data; None if it is not prepared yet.
        available: resources ("CPU", "GPU") of the cluster or of this machine.

    Returns:
        The lines to print.

    Raises:
        ConfigError: the number of image codes is not known before the data is prepared.
    """
    facts, epochs = data_facts(config), "unknown until the data is prepared"
    train, workers = config.train, config.cluster.most
    if manifest is not None:
        facts = manifest.facts
        rows = manifest.rows("train")
        epochs = f"{train.steps * train.batch / rows:,.2f} of {rows:,} training rows"
    if facts is None:
        raise ConfigError(
            f"data.tokenizer: the number of codes of {config.data.tokenizer!r} is not known yet; "
            "prepare the data first (`python -m jobs.prepare CONFIG`)"
        )
    counts = parameters(config, facts)
    micro_batches = -(-train.batch // (workers * train.rows_at_once(facts.length)))
    needed_flops = step_flops(config, facts)
    work = step_work(config, facts)(train.batch / (workers * micro_batches))
    # The teacher of a distillation takes two forward passes more.
    repeated = micro_batches * (5 / 3 if config.distill is not None else 1)
    by_stage = [memory(config, facts, stage) for stage in (0, 1, 2, 3)]
    needed = by_stage[train.zero_stage].total / 2**30
    memories = [
        {"stage": f"{stage}{'*' if stage == train.zero_stage else ''}"}
        | {part: f"{size / 2**30:.2f}" for part, size in (asdict(parts) | {"total": parts.total}).items()}
        for stage, parts in enumerate(by_stage)
    ]
    times = []
    for name, gpu in gpus.items():
        peak = 1e12 * (gpu.bf16 if train.precision == "bf16" else gpu.fp32)
        parts = work.seconds(gpu)
        seconds = sum(parts.values()) * repeated
        times.append(
            {
                "GPU": name,
                "s per step": f"{seconds:.3g}",
                "hours": f"{seconds * train.steps / 3600:.3g}",
                "of peak": f"{train.batch * row_flops(config, facts) / (workers * peak * seconds):.0%}",
                "longest part": max(parts, key=parts.__getitem__),
                "GiB needed": f"{needed:.1f}",
                "GiB": f"{gpu.memory:g}",
                "memory": "fits" if needed <= RESERVE * gpu.memory else "DOES NOT FIT",
            }
        )
    lines = [
        f"parameters   {sum(counts.values()):,} ({', '.join(f'{k} {n:,}' for k, n in counts.items() if n)})",
        f"tokens       {train.steps * train.batch * facts.length:,} in {train.steps:,} steps of {train.batch} rows "
        f"of {facts.length}",
        f"epochs       {epochs}",
        f"workers      {workers}, each with {micro_batches} micro-batches of up to {train.micro_size} per step; "
        f"{config.data.streams} data streams",
        f"compute      {needed_flops:.3g} FLOP per step, {needed_flops * train.steps:.3g} FLOP in total",
        f"micro-batch  {work.moved / 1e9:,.3g} GB read and written in {work.launches:,.0f} kernels",
        "",
        f"memory per GPU, GiB, {train.precision} (* is the run's ZeRO stage)",
        aligned(table_of(memories)),
        "",
        f"predicted time on {workers} GPUs, without communication and optimiser (a prediction, not a measurement)",
        aligned(table_of(times)),
        "",
    ]
    if caches := sampling_caches(config.model, facts, config.sampling):
        size = f"{caches / 2**30:.2f} GiB of keys and values"
        lines += [f"sampling     {size} for a batch of {config.sampling.batch} rows", ""]
    return "\n".join([*lines, *_resource_lines(config, available)])


def _empty_model(config: RunConfig, facts: DataFacts) -> Denoiser:
    """Build the run's model without storage for its parameters."""
    with torch.device("meta"):
        return build(config.model, facts.vocab_size, facts.length, facts.bos, facts.modalities)


def _groups(config: RunConfig, facts: DataFacts) -> Bool[np.ndarray, "B L"]:
    """Draw the groups of some rows as training draws them."""
    bos, shape = facts.bos is not None, (_ROWS, facts.length)
    return partition.draw(config.diffusion, seed=config.seed, step=0, shape=shape, bos=bos).groups


def _resource_lines(config: RunConfig, available: Mapping[str, float]) -> list[str]:
    """Compare the resources that the run needs with those available."""
    cluster = config.cluster
    needed = {
        "GPU": 0 if cluster.accelerator == "cpu" else cluster.most,
        "CPU": cluster.most * cluster.cpus_per_worker,
    }
    lines = []
    for name, count in needed.items():
        have = available.get(name, 0)
        verdict = "enough" if have >= count else f"{count - have:g} TOO FEW"
        if name == "GPU" and cluster.accelerator == "auto" and have < count:
            verdict = "one machine takes CPUs, a cluster refuses the run" if have else "the run takes CPUs"
        lines.append(f"{name}s         {count} needed, {have:g} available: {verdict}")
    return lines
