"""Checkpoints that are damaged, belong to another run, do not fit, or are no longer needed."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config.schema import RunConfig, TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.errors import CheckpointError, DataError
from pipeline.run import Run
from pipeline.training import checkpoint, resume
from tests.support import observed
from tests.support.observed import quick
from tests.support.tiny_runs import tiny
from tests.support.workers import Workers


@pytest.fixture(scope="module")
def original(run_storage: Path, groups: dict[int, Workers]) -> RunConfig:
    """A finished run of two workers at stage 1 with checkpoints of steps 2, 4 and 6."""
    config = quick(run_storage, "whole", steps=6, checkpoint_every=2, validate_every=2, keep=5)
    assert groups[2](observed.train_one, config)[0].error is None
    return config


@pytest.fixture
def config(original: RunConfig, tmp_path: Path) -> RunConfig:
    """The same run in a folder of its own."""
    shutil.copytree(Run(original).folder, tmp_path / original.name)
    cluster = original.cluster.model_copy(update={"storage": str(tmp_path)})
    return original.model_copy(update={"cluster": cluster})


def changed(config: RunConfig, section: str, **keys: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=keys)})


def truncate(folder: Path) -> str:
    file = folder / "optimizer_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return f"{file.name} has {file.stat().st_size} bytes, expected {file.stat().st_size + 100}"


def lose_a_file(folder: Path) -> str:
    (folder / "ema_00001.safetensors").unlink()
    return "ema_00001.safetensors is missing"


def lose_the_list_of_a_worker(folder: Path) -> str:
    (folder / "files_00001.json").unlink()
    return "worker 1 of 2 never finished"


def lose_all_lists(folder: Path) -> str:
    for file in folder.glob("files_*.json"):
        file.unlink()
    return "no list of files: it was never finished"


def flip_a_bit(folder: Path) -> str:
    file = folder / "ema_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return "ema_00000.safetensors does not match its SHA-256"


def cut_a_list(folder: Path) -> str:
    file = folder / "files_00000.json"
    file.write_text(file.read_text()[:-5])
    return "its list of files is damaged"


def garble_a_list(folder: Path) -> str:
    (folder / "files_00000.json").write_text('{"workers": 2, "step": 6, "files": []}')
    return "its list of files is damaged"


DAMAGES = [
    truncate,
    lose_a_file,
    lose_the_list_of_a_worker,
    lose_all_lists,
    flip_a_bit,
    cut_a_list,
    garble_a_list,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    config: RunConfig, damage: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(Run(config).folder)
    problem = damage(run / "step_00000006")
    caplog.set_level("WARNING", logger="pipeline")
    plan = resume.plan_resume(Run(config), 2)
    assert plan is not None
    assert plan.state.step == 4
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"checkpoint {run}/step_00000006 is not usable: {problem}")
    assert warning.endswith("; falling back to the one before")
    assert checkpoint.steps(str(run)) == [2, 4]


def test_the_run_goes_on_from_the_checkpoint_before(
    config: RunConfig, original: RunConfig, groups: dict[int, Workers]
) -> None:
    run = Path(Run(config).folder)
    files = {file.name: file.read_bytes() for file in (run / "step_00000006").glob("ema_*")}
    truncate(run / "step_00000006")
    lose_a_file(run / "step_00000004")
    seen = groups[2](observed.train_one, config)[0]
    assert seen.error is None
    assert list(seen.losses) == [3, 4, 5, 6]
    assert sum("is not usable" in line for line in seen.log) == 2
    assert files == {file.name: file.read_bytes() for file in (run / "step_00000006").glob("ema_*")}


def test_without_a_usable_checkpoint_the_run_starts(config: RunConfig) -> None:
    run = Path(Run(config).folder)
    for step in (2, 4, 6):
        truncate(run / checkpoint.name_of(step))
    assert resume.plan_resume(Run(config), 2) is None


def test_a_checkpoint_of_other_data_is_refused(config: RunConfig) -> None:
    """A source that was changed in place: the config is the same, the rows are not."""
    manifest = Manifest.read(Run(config).data_path)
    same = Run(config).replace(given_manifest=manifest)
    resume.check_data(same)
    source = manifest.source.model_copy(update={"fingerprint": "f" * 64})
    run = same.replace(given_manifest=manifest.model_copy(update={"source": source}))
    with pytest.raises(CheckpointError, match=r"step_00000006 was trained on other data") as caught:
        resume.check_data(run)
    assert str(caught.value).splitlines()[1:] == [f"  source: {manifest.source.fingerprint} -> {'f' * 64}"]
    with pytest.raises(CheckpointError, match="other data"):
        resume.plan_resume(run, 2)
    assert checkpoint.steps(run.folder) == [2, 4, 6]


def test_a_damaged_checkpoint_is_no_model(config: RunConfig) -> None:
    path = f"{Run(config).folder}/step_00000006"
    problem = flip_a_bit(Path(path))
    with pytest.raises(CheckpointError, match=f"{path} is not usable: {problem}"):
        checkpoint.ema_weights(path, config.model, Manifest.read(Run(config).data_path))


def test_a_checkpoint_of_another_model_is_refused(config: RunConfig) -> None:
    """The folder of another run under this one's name."""
    other = changed(changed(config, "model", hidden=32), "optim", lr=0.5)
    run = Run(config).folder
    with pytest.raises(CheckpointError) as caught:
        resume.plan_resume(Run(other), 2)
    assert str(caught.value).splitlines()[1:] == ["  model.hidden: 16 -> 32", "  optim.lr: 0.01 -> 0.5"]
    assert f"{run}/step_00000006 belongs to a run with another config" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"EMA of embedding.weight \[257, 32\] is not whole"):
        checkpoint.ema_weights(f"{run}/step_00000006", other.model, Manifest.read(Run(config).data_path))
    assert checkpoint.steps(run) == [2, 4, 6]  # not damaged, so not removed


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("train", {"batch": 16}),
        ("train", {"ema": 0.99}),
        ("train", {"precision": "bf16"}),
        ("train", {"init_from": "models:/x/1"}),
        ("data", {"streams": 2}),
        ("diffusion", {"loss_weight": "uniform"}),
        ("optim", {"betas": (0.9, 0.95)}),
    ],
    ids=str,
)
def test_what_a_resumed_run_may_not_change(config: RunConfig, section: str, keys: dict[str, object]) -> None:
    other = changed(config, section, **keys)
    ((key, value),) = keys.items()
    with pytest.raises(CheckpointError) as caught:
        resume.plan_resume(Run(other), 2)
    old = getattr(getattr(config, section), key)
    as_list = [list(v) if isinstance(v, tuple) else v for v in (old, value)]
    assert str(caught.value).splitlines()[1:] == [f"  {section}.{key}: {as_list[0]!r} -> {as_list[1]!r}"]


def test_what_a_resumed_run_may_change(config: RunConfig) -> None:
    other = changed(
        config,
        "train",
        steps=100,
        micro_batch=4,
        log_every=7,
        validate_every=3,
        checkpoint_every=3,
        keep=1,
        on_nonfinite="stop",
        activation_checkpointing=True,
        offload_optimizer=True,
    )
    other = changed(changed(other, "evaluation", rows=4), "sampling", num_samples=2)
    other = changed(changed(other, "tracking", experiment="x"), "cluster", max_failures=0)
    plan = resume.plan_resume(Run(other), 2)
    assert plan is not None
    assert plan.state.step == 6
    assert not plan.universal


@pytest.mark.parametrize("steps", [5, 7])
def test_the_steps_of_a_cosine_are_fixed(steps: int, tmp_path: Path) -> None:
    """With other steps the learning rate would jump: of a finished run, from 0 up again."""
    config = tiny(tmp_path, "cosine", optim={"schedule": "cosine"}, train={"steps": 6})
    other = tiny(tmp_path, "cosine", optim={"schedule": "cosine"}, train={"steps": steps})
    with pytest.raises(CheckpointError, match=f"train.init_from to(.|\n)*  train.steps: 6 -> {steps}$"):
        resume.check_same(config.model_dump(mode="json"), other, "there")
    resume.check_same(config.model_dump(mode="json"), config, "there")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("skipped.json", "", "JSONDecodeError"),
        ("skipped.json", '{"5": [1]}', "TypeError"),
        ("skipped.json", '{"x": {"places": [1]}}', "ValueError"),
        ("run.json", '{"run_id": "a"}', "KeyError: 'tracking_uri'"),
        ("run.json", "[]", "TypeError"),
    ],
)
def test_damaged_records_are_named_before_anything_starts(
    name: str, text: str, says: str, tmp_path: Path
) -> None:
    run = Run(tiny(tmp_path, "damaged"))
    resume.precheck(run)
    storage.publish_text(storage.join(run.folder, name), text)
    with pytest.raises(DataError, match=rf"{run.folder}/{name} is damaged \({says}"):
        resume.precheck(run)


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    run = Run(tiny(tmp_path, "sampled", sampling={"model": str(tmp_path)}))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no model.safetensors"):
        run.sampled_model()


def test_a_new_key_of_training_is_fixed_until_it_is_listed_here() -> None:
    free = {
        "steps",
        "micro_batch",
        "micro_tokens",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "keep",
        "on_nonfinite",
    }
    free |= {"persistent_parameters", "offload_optimizer", "activation_checkpointing", "zero_stage"}
    free |= {"compile", "profile_steps"}
    assert {f"train.{key}" for key in TrainConfig.model_fields.keys() - free} == resume.FIXED_KEYS


@pytest.mark.parametrize("stage", [0, 3])
def test_a_stage_that_cannot_be_converted_is_refused(config: RunConfig, stage: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        resume.plan_resume(Run(changed(config, "train", zero_stage=stage)), 2)
    message = str(caught.value)
    path = f"{Run(config).folder}/step_00000006"
    assert message.startswith(f"train.zero_stage: {path} was written at stage 1")
    assert f"does not convert to stage {stage}; keep stage 1" in message
    assert f"train.init_from={path}" in message


def test_newest_usable_and_pruning(config: RunConfig) -> None:
    """The best validation stays, however old; incomplete folders are not counted, and not touched."""
    run = Run(config).folder
    scores = {s: checkpoint.read_state(f"{run}/{checkpoint.name_of(s)}").validation for s in (2, 4, 6)}
    assert None not in scores.values()
    rescore(Path(run), 2, 1.5)
    rescore(Path(run), 4, float("nan"))
    shutil.copytree(f"{run}/step_00000006", f"{run}/step_00000010")
    shutil.copytree(f"{run}/step_00000006", f"{run}/step_00000020")
    lose_the_list_of_a_worker(Path(run) / "step_00000020")
    checkpoint.prune(run, keep=2)
    assert checkpoint.steps(run) == [2, 6, 10, 20]
    assert checkpoint.newest(run) == f"{run}/step_00000010"
    rescore(Path(run), 2, 1e9)
    checkpoint.prune(run, keep=2)
    assert checkpoint.steps(run) == [6, 10, 20]
    assert checkpoint.latest(run) == f"{run}/step_00000010"
    assert checkpoint.steps(run) == [6, 10, 20]  # reading removes nothing
    checkpoint.remove_after(run, 10)
    assert checkpoint.steps(run) == [6, 10]


def rescore(run: Path, step: int, validation: float) -> None:
    """Write another validation perplexity into a checkpoint, as if it had been saved with it."""
    folder = run / checkpoint.name_of(step)
    fields = {**json.loads((folder / "state.json").read_text()), "validation": validation}
    text = json.dumps(fields).encode()
    (folder / "state.json").write_bytes(text)
    listing = json.loads((folder / "files_00000.json").read_text())
    listing["files"]["state.json"] = [len(text), hashlib.sha256(text).hexdigest()]
    (folder / "files_00000.json").write_text(json.dumps(listing))
