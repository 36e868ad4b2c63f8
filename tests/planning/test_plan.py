"""The plan of a run against counted parameters, the engine's real tensors, and counted operations."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.plan import plan as print_plan
from pipeline.config.load import load, parse
from pipeline.config.model import LoraConfig
from pipeline.config.schema import RunConfig
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.errors import ConfigError
from pipeline.models import build, head
from pipeline.models.adapters.lora import UP, adapt
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from pipeline.models.model_folder import DataFacts
from pipeline.planning import memory, plan
from pipeline.planning.gpus import GPUS, gpu_of
from tests.support.flop_counter import flop_counter
from tests.support.tiny_runs import tiny
from tests.support.workers import Workers

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS, LENGTH = 16, 256
MODELS: dict[str, dict[str, Any]] = {
    "pgm": {"kind": "pgm", "encoder_blocks": 2, "decoder_blocks": 2},
    "pgm, pooled": {
        "kind": "pgm",
        "encoder_blocks": 1,
        "decoder_blocks": 2,
        "registers": 4,
        "swap": {"pooling": "mean", "query": "mlp4", "every_block": True},
    },
    "mdlm": {"kind": "mdlm", "blocks": 2},
    "complementary": {"kind": "mdlm", "blocks": 2, "complementary": True},
    "ar": {"kind": "ar", "blocks": 2},
}
CLASSES = {"kind": "pgm", "encoder_blocks": 2, "decoder_blocks": 2, "classes": 5}


def configured(model: dict[str, Any], precision: str = "fp32", recompute: bool = False) -> RunConfig:
    ar, classes = model["kind"] == "ar", model.get("classes")
    config = parse(
        {
            "name": "p",
            "data": {"length": LENGTH, "streams": 4},
            "model": {"hidden": 64, "heads": 4, "dropout": 0.1, **model, "classes": None},
            "train": {
                "batch": ROWS,
                "micro_batch": ROWS,
                "precision": precision,
                "activation_checkpointing": recompute,
            },
            "sampling": {"steps": LENGTH if ar else 4, "order": "left_to_right" if ar else "uniform"},
        },
        "test",
    )
    # Text has no labels; what classes cost does not depend on what the tokens are.
    return config.model_copy(update={"model": config.model.model_copy(update={"classes": classes})})


def first_batch(config: RunConfig, model: Denoiser) -> Batch:
    """The batch of the run's first step, on random tokens."""
    diffusion, cpu = config.diffusion, torch.device("cpu")
    tokens = np.random.default_rng(0).integers(0, 256, (ROWS, LENGTH))
    present = np.ones(ROWS, dtype=bool)
    draws = partition.draw(diffusion, seed=config.seed, step=0, shape=tokens.shape, bos=False)
    objective = Objective(diffusion, False, model.both_groups, model.left_to_right)
    divisor = objective.normaliser(draws.groups)
    return objective.batch(tokens, draws, present, divisor=divisor, device=cpu)


def known_facts(config: RunConfig) -> DataFacts:
    facts = plan.data_facts(config)
    assert facts is not None
    return facts


def real(config: RunConfig) -> Denoiser:
    facts = known_facts(config)
    torch.manual_seed(0)
    return build(config.model, facts.vocab_size, facts.length, facts.bos).train()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_operations_are_the_models(name: str) -> None:
    config = configured(MODELS[name])
    facts, model = known_facts(config), real(config)
    assert sum(plan.parameters(config, facts).values()) == sum(p.numel() for p in model.parameters())
    # The plain kernel of attention: the counter knows no other on a CPU.
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        model(first_batch(config, model)).sum().backward()
    counted = counter.get_total_flops()
    if config.model.kind == "ar":  # that kernel multiplies the half that causal attention does not need
        counted -= 3 * 4 * config.model.blocks * ROWS * config.model.hidden * (LENGTH * (LENGTH - 1) // 2)
    assert plan.step_flops(config, facts) == pytest.approx(counted, rel=0.02)


def equal_halves(config: RunConfig, model: Denoiser) -> Batch:
    """A batch whose groups are halves of every row: no kernel pads or concatenates segments."""
    batch = first_batch(config, model)
    if model.left_to_right:
        return batch
    groups = torch.stack([torch.randperm(LENGTH) < LENGTH // 2 for _ in range(ROWS)])
    targets = torch.ones_like(groups) if model.both_groups else groups
    labels = None if config.model.classes is None else torch.arange(ROWS) % config.model.classes
    return Batch(batch.tokens, groups, targets, batch.weights, labels)


def prepare_as_on_gpus(config: RunConfig, monkeypatch: pytest.MonkeyPatch, chunk: int) -> Denoiser:
    """The model as on a GPU: fused dropout, whose mask has a byte per value, logits in chunks, bf16 products."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: torch.native_dropout(x, p, True)[0])
    monkeypatch.setattr(head, "CHUNK_LOGITS", {"cpu": chunk})
    monkeypatch.setattr(head, "operands", lambda *tensors: list(tensors))
    monkeypatch.setattr(head, "product", lambda a, b: a.float() @ b.float())
    monkeypatch.setattr(memory, "CHUNK_LOGITS", {"cuda": chunk})
    model = real(config)
    model.recompute = config.train.activation_checkpointing
    return model.bfloat16() if config.train.precision == "bf16" else model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "recompute", "tolerance"),
    # With recomputation little is kept, so that indices and statistics, which are not counted, weigh more.
    [*((name, False, 0.03) for name in [*MODELS, "classes"]), ("pgm", True, 0.1), ("mdlm", True, 0.1)],
)
def test_activations_are_what_autograd_keeps(
    name: str, recompute: bool, tolerance: float, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predicted bytes are those of the storages that autograd holds at the end of a real forward pass."""
    config = configured({**MODELS, "classes": CLASSES}[name], precision, recompute)
    model = prepare_as_on_gpus(config, monkeypatch, chunk=1 << 16)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        losses = model(equal_halves(config, model))
    assert losses.requires_grad
    expected = plan.step_activations(config, known_facts(config)).kept(ROWS)
    assert expected == pytest.approx(sum(kept.values()), rel=tolerance)


@pytest.mark.parametrize(("logits", "recompute"), [("in chunks", True), ("at once", False)])
def test_the_peak_is_what_the_allocator_sees(
    logits: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 10%, the largest number of bytes allocated at a time in a forward and a backward pass.

    The median of three passes, since events that are too close for the profiler's clock may change places.
    """
    config = configured(MODELS["pgm"], "bf16", recompute)
    model = prepare_as_on_gpus(config, monkeypatch, chunk=1 << (18 if logits == "in chunks" else 22))
    batch = equal_halves(config, model)
    batch.target_index  # noqa: B018  made on the host, before the step
    peaks = []
    for _ in range(3):
        model.zero_grad()
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as profiler:
            model(batch).sum().backward()
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        peaks.append(np.cumsum([size for _, size in sizes]).max())
    expected = pytest.approx(float(np.median(peaks)), rel=0.1)
    assert plan.step_activations(config, known_facts(config)).peak(ROWS) == expected


def held(rank: int, workers: int, config: RunConfig, vocabulary: int) -> dict[str, int]:
    """Bytes that one worker's engine holds after a step."""
    from pipeline.training.ema import EMA
    from pipeline.training.engine import Engine

    torch.manual_seed(0)
    model = build(config.model, vocabulary, config.data.length)
    engine = Engine(model, config, 1, torch.device("cpu"), universal=False)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (2, config.data.length))
    draws = partition.draw(config.diffusion, seed=0, step=0, shape=tokens.shape, bos=False)
    objective = Objective(config.diffusion, bos=False, both_groups=True)
    divisor = objective.normaliser(draws.groups)
    cpu = torch.device("cpu")
    batch = objective.batch(tokens, draws, np.ones(2, dtype=bool), divisor=divisor, device=cpu)
    engine.backward(batch, last=True)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    engine.step(0)
    optimiser = engine._engine.optimizer
    inner = getattr(optimiser, "optimizer", optimiser)
    moments = sum(v.nbytes for state in inner.state.values() for k, v in state.items() if k.startswith("exp"))
    weights = {p.data.data_ptr() for p in model.parameters()}
    masters = engine.masters()
    own = sum(v.nbytes for v in masters.values() if v.data_ptr() not in weights)
    if config.train.zero_stage < 3:
        low = sum(p.data.nbytes for p in model.parameters())
    else:
        low = sum(p.ds_tensor.nbytes for p in model.parameters())
    average = sum(v.nbytes for v in EMA(masters, 0.9).slices.values())
    engine.close()
    return {"weights": low, "optimiser": moments + own, "ema": average, "gradients": gradients}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_are_the_engines(groups: dict[int, Workers], tmp_path: Path, precision: str) -> None:
    for stage in (0, 1, 2, 3):
        train = {"zero_stage": stage, "precision": precision, "persistent_parameters": 0}
        config = tiny(tmp_path, "held", train=train, model={"hidden": 32})
        facts = known_facts(config)
        count = sum(plan.parameters(config, facts).values())
        expected = memory.states(count, config.train, 2)
        by_rank = groups[2](held, config, facts.vocab_size)
        for part in ("weights", "optimiser", "ema"):
            mean = sum(held_bytes[part] for held_bytes in by_rank) / 2
            assert mean == pytest.approx(getattr(expected, part), rel=0.03), (stage, part)
        if stage == 0:
            assert by_rank[0]["gradients"] == expected.gradients


@pytest.mark.parametrize("name", ["ar", "pgm, causal", "pgm, pooled"])
def test_caches_are_those_that_sampling_keeps(name: str) -> None:
    causal = {**MODELS["pgm, pooled"], "encoder": "causal"}
    config = configured(causal if name == "pgm, causal" else MODELS[name])
    refresh_every = 4 if name == "pgm, pooled" else 1
    sampling = config.sampling.model_copy(update={"refresh_every": refresh_every, "batch": 3})
    model = real(config).eval()
    state = model.open(3, refresh_every=refresh_every)
    model.hidden(state, torch.zeros(3, dtype=torch.int64), [1, 1, 1])
    kept = state.memory
    stored = kept.stored if name == "ar" else [*kept.encoder, *kept.swaps, *kept.decoder]
    real_bytes = sum(x.nbytes for part in stored for x in (part.cache.keys, part.cache.values))
    real_bytes += 0 if name == "ar" else kept.vectors.nbytes
    assert memory.sampling_caches(config.model, known_facts(config), sampling) == real_bytes
    halved = sampling.model_copy(update={"precision": "bf16"})
    assert memory.sampling_caches(config.model, known_facts(config), halved) == real_bytes // 2
    plain = configured(MODELS["pgm"])
    assert memory.sampling_caches(plain.model, known_facts(plain), plain.sampling) == 0


def test_the_papers_model_has_the_size_that_its_weights_have() -> None:
    config = load(CONFIGS / "text" / "pgm_8_8.yaml", ["data.tokenizer=bytes"])
    counts = plan.parameters(config, DataFacts(50_257, 1024, None, 50_256))
    assert f"{sum(counts.values()) / 1e6:.1f}" == "193.0"


def test_stages_divide_and_recomputing_saves() -> None:
    config = load(CONFIGS / "text" / "pgm_8_8.yaml", ["cluster.workers=8", "data.tokenizer=bytes"])
    facts = known_facts(config)
    by_stage = [plan.memory(config, facts, stage).total for stage in (0, 1, 2, 3)]
    assert by_stage == sorted(by_stage, reverse=True)
    again = config.model_copy(
        update={"train": config.train.model_copy(update={"activation_checkpointing": True})}
    )
    assert plan.step_activations(again, facts).peak(32) < plan.step_activations(config, facts).peak(32) / 4
    assert plan.step_flops(again, facts) == pytest.approx(plan.step_flops(config, facts) * 4 / 3)


def test_a_plan_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"cluster.storage={tmp_path}/runs", "cluster.accelerator=gpu", "cluster.workers=8"]
    config = load(CONFIGS / "text" / "quickstart.yaml", words)
    print_plan(config, "H100")
    output = capsys.readouterr().out
    for part in (
        f"tokens       {500 * 32 * 64:,} in 500 steps of 32 rows of 64",
        "epochs       unknown until the data is prepared",
        "8, each with 1 micro-batches of up to 16 rows",
        "  1*  ",
        "  h100 ",
        "  fits",
        f"GPUs         8 needed, {torch.cuda.device_count()} available",
    ):
        assert part in output, output
    assert "a100" not in output
    print_plan(config, "true")
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in GPUS)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConfigError, match=r"plan: 'h10' is not a GPU in the table; did you mean 'h100'\?"):
        print_plan(config, "h10")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),  # slower than the table's
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_by_the_name_of_their_driver(device: str, name: str | None) -> None:
    assert gpu_of(device) is (None if name is None else GPUS[name])


@pytest.mark.parametrize("recompute", [False, True])
def test_an_adapter_has_gradients_moments_and_averages_alone(recompute: bool) -> None:
    config = configured(MODELS["pgm"], "bf16", recompute)
    lora = LoraConfig(rank=4)
    tuned = config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})
    facts = known_facts(config)
    whole, own = plan.memory(config, facts, 1), plan.memory(tuned, facts, 1)
    model = build(config.model, facts.vocab_size, facts.length, facts.bos)
    frozen = {name: value.numel() for name, value in model.named_parameters()}
    adapt(model, lora)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert whole.weights == 2 * sum(frozen.values())
    assert own.weights == 2 * (sum(frozen.values()) + trained)
    assert (own.gradients, own.optimiser, own.ema) == (2 * trained, 12 * trained, 4 * trained)
    names = [name.removesuffix(UP) + "weight" for name in model.state_dict() if name.endswith(UP)]
    adapted = sum(frozen[name] for name in names)
    assert own.activations - whole.activations == (0 if recompute else 2 * adapted)
