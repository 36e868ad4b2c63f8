"""ZeRO stages 0 to 3 on two workers against each other and against plain training in one process."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.run import Run
from pipeline.training import checkpoint, engine
from tests.support import observed, plain
from tests.support.workers import Workers

STAGES = (0, 1, 2, 3)
STEPS, HALF, SHORT = 12, 8, 6  # of runs in float32, in bf16, and of their variants
Runs = dict[str, tuple[RunConfig, observed.Seen]]


def _configs(storage: Path) -> list[RunConfig]:
    """Accumulation of two micro-batches a worker; gradients of norm 1 and more are clipped to 0.1."""

    def run(name: str, dropout: float = 0.0, steps: int = STEPS, **train: object) -> RunConfig:
        return observed.quick(storage, name, dropout, steps=steps, micro_batch=2, **train)

    found = []
    for stage in STAGES:
        # Validation in the middle computes with other weights for a while, and must leave no trace.
        # The last two steps of stage 1 are traced.
        often = {"validate_every": 7, "checkpoint_every": STEPS, "profile_steps": 2 * (stage == 1)}
        found.append(run(f"stage-{stage}", zero_stage=stage, **often))
        found.append(run(f"stage-{stage}-bf16", zero_stage=stage, precision="bf16", steps=HALF))
    found.append(run("stage-3-persistent", zero_stage=3, persistent_parameters=100_000, steps=SHORT))
    for stage in (1, 2, 3):
        found.append(run(f"stage-{stage}-offload", zero_stage=stage, offload_optimizer=True, steps=SHORT))
    for stage in (1, 3):
        for again in (False, True):
            name = f"stage-{stage}-{'recomputed' if again else 'kept'}"
            found.append(run(name, 0.1, zero_stage=stage, activation_checkpointing=again, steps=SHORT))
    return found


@pytest.fixture(scope="module")
def runs(run_storage: Path, groups: dict[int, Workers]) -> Runs:
    """Every config by name, and what rank 0 saw of its run."""
    configs = _configs(run_storage)
    seen = groups[2](observed.train, configs, True)[0]
    return {config.name: (config, one) for config, one in zip(configs, seen, strict=True)}


@pytest.fixture(scope="module")
def reference(run_storage: Path) -> plain.Plain:
    return plain.train(observed.quick(run_storage, "plain", steps=STEPS))


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any entry."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def first(count: int, values: dict[int, float]) -> dict[int, float]:
    """Values of the first steps."""
    return {step: values[step] for step in range(1, count + 1)}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_equal_plain_training(runs: Runs, reference: plain.Plain, stage: int) -> None:
    seen = runs[f"stage-{stage}"][1]
    assert seen.error is None
    assert seen.losses.keys() == reference.losses.keys() == set(range(1, STEPS + 1))
    assert seen.losses == pytest.approx(reference.losses, abs=1e-5, rel=0)
    assert reference.losses[STEPS] < reference.losses[1] - 1  # it learns: equal numbers mean something


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_norms_before_clipping(runs: Runs, reference: plain.Plain, stage: int) -> None:
    assert runs[f"stage-{stage}"][1].norms == pytest.approx(reference.norms, rel=1e-5)
    assert min(reference.norms.values()) > 0.1  # every step was clipped


@pytest.mark.parametrize("stage", STAGES)
def test_weights_equal_plain_training(runs: Runs, reference: plain.Plain, stage: int) -> None:
    """Rounding grows a little: Adam divides every gradient by its own size."""
    assert furthest(runs[f"stage-{stage}"][1].weights, reference.weights) < 1e-4


@pytest.mark.parametrize("precision", ["", "-bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_ema_is_the_average_of_the_masters(runs: Runs, stage: int, precision: str) -> None:
    config, seen = runs[f"stage-{stage}{precision}"]
    path = checkpoint.latest(Run(config).folder)
    assert path is not None
    stored = checkpoint.ema_weights(path, config.model, Manifest.read(Run(config).data_path))
    assert furthest(stored, seen.average) < 1e-6
    assert furthest(stored, seen.weights) > 1e-3  # and not simply the weights


def test_ema_equals_plain_training(runs: Runs, reference: plain.Plain) -> None:
    assert max(furthest(runs[f"stage-{stage}"][1].average, reference.average) for stage in STAGES) < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_close_to_fp32(runs: Runs, reference: plain.Plain, stage: int) -> None:
    """bf16 has 8 bits, so losses are good to a few thousandths; masters in bf16 would be off by tenths."""
    seen = runs[f"stage-{stage}-bf16"][1]
    assert seen.losses == pytest.approx(first(HALF, reference.losses), abs=0.01, rel=0)
    assert seen.norms == pytest.approx(first(HALF, reference.norms), rel=0.02)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in seen.weights.values())


@pytest.mark.parametrize("name", ["stage-3-persistent", *(f"stage-{stage}-offload" for stage in (1, 2, 3))])
def test_where_tensors_live_changes_nothing(runs: Runs, reference: plain.Plain, name: str) -> None:
    seen = runs[name][1]
    assert seen.losses == pytest.approx(first(SHORT, reference.losses), abs=1e-5, rel=0)
    assert seen.norms == pytest.approx(first(SHORT, reference.norms), rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_recomputed_activations_change_nothing(runs: Runs, stage: int) -> None:
    kept, again = runs[f"stage-{stage}-kept"][1], runs[f"stage-{stage}-recomputed"][1]
    assert again.losses == pytest.approx(kept.losses, abs=1e-6, rel=0)
    assert abs(kept.losses[SHORT] - runs["stage-1"][1].losses[SHORT]) > 1e-4  # dropout was on


def test_steps_are_traced(runs: Runs) -> None:
    file = Path(Run(runs["stage-1"][0]).folder, "profile", "trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert len(names) == 2
    assert any("layer_norm" in event["name"] for event in events)
    assert not Path(Run(runs["stage-2"][0]).folder, "profile").exists()


@pytest.mark.slow
def test_compiled_blocks_train_alike(
    run_storage: Path, groups: dict[int, Workers], reference: plain.Plain
) -> None:
    """Under stages 0 to 2, which the key goes with."""
    configs = [
        observed.quick(run_storage, f"compiled-{stage}", zero_stage=stage, compile=True, steps=SHORT)
        for stage in (0, 1, 2)
    ]
    for seen in groups[2](observed.train_compiled, configs)[0]:
        assert seen.error is None
        assert seen.losses == pytest.approx(first(SHORT, reference.losses), abs=1e-4, rel=0)
        assert seen.norms == pytest.approx(first(SHORT, reference.norms), rel=1e-4)


def in_small_buckets(rank: int, workers: int, configs: list[RunConfig]) -> list[observed.Seen]:
    """Train while gradients take many buckets, some smaller than a weight, as those of large models do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "BUCKET_BYTES", 2000)
        return observed.train(rank, workers, configs)


def test_buckets_change_nothing(
    run_storage: Path, groups: dict[int, Workers], reference: plain.Plain
) -> None:
    configs = [
        observed.quick(run_storage, f"buckets-{stage}", zero_stage=stage, steps=3) for stage in (1, 2, 3)
    ]
    for seen in groups[2](in_small_buckets, configs)[0]:
        assert seen.error is None
        assert seen.losses == pytest.approx(first(3, reference.losses), abs=1e-5, rel=0)
        assert seen.norms == pytest.approx(first(3, reference.norms), rel=1e-5)
