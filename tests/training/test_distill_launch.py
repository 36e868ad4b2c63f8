"""One distillation through Ray Train, from a registered teacher to registered students."""

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from pipeline import load_model, tracking
from pipeline.config.schema import DistillConfig, RunConfig
from pipeline.data.tokenizers import load_tokenizer
from pipeline.models import build, model_folder
from pipeline.run import Run
from pipeline.training import distillation, launch
from pipeline.training.finish import RunResult
from tests.support.small_models import shake
from tests.support.tiny_runs import tiny


@pytest.fixture(scope="module")
def config(run_storage: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The teacher is version 1 of a model whose alias moves on once the run has begun."""
    storage = tmp_path_factory.mktemp("distil")
    config = tiny(
        run_storage,
        "student",
        cluster={"storage": str(storage)},
        sampling={"num_samples": 8, "batch": 4, "steps": 4},
        train={"checkpoint_every": 4},
    )
    uri = tracking.tracking_uri(config)
    for version in ("1", "2"):
        teacher = storage / f"teacher-{version}"
        torch.manual_seed(int(version))
        weights = shake(build(config.model, 257, 16)).state_dict()
        model_folder.write(
            teacher,
            config.model,
            model_folder.DataFacts(257, 16, None, 256),
            weights,
            model_folder.Background(),
        )
        load_tokenizer("bytes").save(teacher)
        run_id = tracking.open_run(uri, "test", f"teacher-{version}", params={}, tags={})
        number = tracking.register_model(uri, run_id, teacher, "teacher", {})
        tracking.end_run(uri, run_id, "FINISHED")
        if version == "1":
            tracking.set_alias(uri, "teacher", "teacher", number)
    distill = DistillConfig(teacher="models:/teacher@teacher", rounds=2, teacher_steps=8)
    return config.model_copy(update={"distill": distill})


@pytest.fixture(scope="module")
def outcome(config: RunConfig) -> RunResult:
    return launch.distill(config)


@pytest.fixture(scope="module")
def client(config: RunConfig) -> MlflowClient:
    return MlflowClient(tracking.tracking_uri(config))


@pytest.fixture(scope="module")
def run(client: MlflowClient, outcome: RunResult) -> MlflowRun:
    (found,) = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], "attributes.run_name = 'student'"
    )
    return found


@pytest.mark.slow
def test_run_is_linked_to_its_teachers_version(
    run: MlflowRun, outcome: RunResult, config: RunConfig, client: MlflowClient
) -> None:
    assert run.info.status == "FINISHED"
    assert run.data.tags["teacher"] == "models:/teacher/1"
    tracking.set_alias(tracking.tracking_uri(config), "teacher", "teacher", "2")
    again = distillation.with_teacher(Run.of(config))
    assert distillation.read_origin(outcome.run)["teacher"] == "models:/teacher/1"
    assert again.config.train.init_from == distillation.teacher_folder(outcome.run, 0)


@pytest.mark.slow
def test_a_student_is_registered_for_every_round(outcome: RunResult, client: MlflowClient) -> None:
    (first,) = client.search_model_versions("name = 'student-round-1'")
    (last,) = client.search_model_versions("name = 'student'")
    assert (first.tags["round"], first.tags["sampling_steps"]) == ("1", "4")
    assert (last.tags["round"], last.tags["sampling_steps"]) == ("2", "2")
    assert outcome.version == "models:/student/1"
    assert not client.get_registered_model(
        "student"
    ).aliases  # it is no teacher of the next pretraining's students


@pytest.mark.slow
def test_students_are_models(outcome: RunResult, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of round 1 is what round 2 learnt from; both can be sampled and read."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", outcome.tracking_uri)
    first = load_model("models:/student-round-1/1")
    expected = model_folder.read_weights(Path(distillation.teacher_folder(outcome.run, 1)))
    assert all(value.equal(expected[name]) for name, value in first.denoiser.named_parameters())
    last = load_model(outcome.model)
    assert any(not value.equal(expected[name]) for name, value in last.denoiser.named_parameters())
    for model in (first, last):
        assert len(model.decode(model.sample(2, steps=2))) == 2


@pytest.mark.slow
def test_quality_against_steps(outcome: RunResult, run: MlflowRun, client: MlflowClient) -> None:
    assert outcome.quality is not None
    header, _, *rows = outcome.quality.splitlines()
    assert header == "| bigram perplexity (entropy) | 2 steps | 4 steps | 8 steps |"
    assert [row.split("|")[1].strip() for row in rows] == ["teacher", "round 1", "round 2"]
    figures = [Path(a.path).name for a in client.list_artifacts(run.info.run_id, "figures")]
    assert set(figures) == {"loss_curve.png", "quality_against_steps.png"}
    assert "quality_against_steps.md" in [a.path for a in client.list_artifacts(run.info.run_id)]
