"""One run through Ray Train, and everything it must leave behind."""

import json
import math
from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from pipeline import load_model
from pipeline.config.schema import RunConfig
from pipeline.errors import CapabilityError, CheckpointError, ConfigError
from pipeline.run import Run
from pipeline.tracking import tracking_uri
from pipeline.training import checkpoint, launch
from pipeline.training.finish import RunResult, finish
from tests.support.tiny_runs import tiny


@pytest.fixture(scope="module")
def config(run_storage: Path) -> RunConfig:
    return tiny(
        run_storage, "launched", train={"validate_every": 4}, cluster={"workers": {"min": 1, "max": 2}}
    )


@pytest.fixture(scope="module")
def outcome(config: RunConfig) -> RunResult:
    return launch.pretrain(config)


@pytest.fixture(scope="module")
def client(config: RunConfig) -> MlflowClient:
    return MlflowClient(tracking_uri(config))


@pytest.fixture(scope="module")
def run(client: MlflowClient, outcome: RunResult) -> MlflowRun:
    experiments = [e.experiment_id for e in client.search_experiments()]
    (found,) = client.search_runs(experiments, "attributes.run_name = 'launched'")
    return found


def test_run_is_finished_with_the_resolved_config(run: MlflowRun, config: RunConfig):
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch"] == "8"
    assert run.data.params["model.heads"] == "2"
    assert run.data.params["cluster.workers.max"] == "2"


def test_metrics_of_every_step(run: MlflowRun, client: MlflowClient):
    for key in ("train/loss", "train/gradient_norm", "train/tokens_per_second", "train/teraflops"):
        points = client.get_metric_history(run.info.run_id, key)
        assert sorted(point.step for point in points) == list(range(1, 9)), key
        assert np.isfinite([point.value for point in points]).all()
    rates = {p.step: p.value for p in client.get_metric_history(run.info.run_id, "train/learning_rate")}
    assert rates[1] == pytest.approx(0.5e-2)
    assert rates[8] == pytest.approx(1e-2)
    steps = [p.step for p in client.get_metric_history(run.info.run_id, "validation/perplexity")]
    assert sorted(steps) == [4, 8]
    nats, bits = (run.data.metrics[f"validation/{name}"] for name in ("nats", "bits_per_byte"))
    assert bits == pytest.approx(nats / math.log(2), rel=0.01)  # of bytes, and few ends of text


def test_data_is_an_input(run: MlflowRun):
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "data"
    assert '"length": 16' in data.dataset.profile


def test_artifacts(run: MlflowRun, client: MlflowClient):
    def names(folder: str) -> list[str]:
        return [Path(a.path).name for a in client.list_artifacts(run.info.run_id, folder)]

    assert "loss_curve.png" in names("figures")
    assert {"step_00000004.txt", "step_00000008.txt"} <= set(names("samples"))


def test_registered_model_is_the_consolidated_folder(
    outcome: RunResult, config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", outcome.tracking_uri)
    registered, local = load_model(str(outcome.version)), load_model(outcome.model)
    for (name, a), (_, b) in zip(
        registered.denoiser.named_parameters(), local.denoiser.named_parameters(), strict=True
    ):
        assert a.equal(b), name
    assert local.sample(2, steps=5, seed=3).equal(registered.sample(2, steps=5, seed=3))
    mlflow.set_tracking_uri(None)


def test_folder_tells_what_ran(outcome: RunResult, config: RunConfig):
    folder = Path(outcome.run)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == Run.of(config).config.model_dump(
        mode="json"
    )
    assert (folder / "loss_curve.png").stat().st_size > 10_000
    assert checkpoint.steps(outcome.run) == [4, 8]
    assert outcome.references["bigram"] < outcome.references["unigram"]
    assert len(outcome.samples) == 2


def test_sampling_job_with_actors(
    outcome: RunResult,
    config: RunConfig,
    run: MlflowRun,
    client: MlflowClient,
    caplog: pytest.LogCaptureFixture,
):
    changes = {"num_samples": 5, "batch": 2, "steps": 3, "view": True}
    wanted = config.model_copy(update={"sampling": config.sampling.model_copy(update=changes)})
    with caplog.at_level("INFO"):
        samples = launch.sample(wanted)
    assert samples.tokens.shape == (5, 16)
    assert (samples.tokens >= 0).all()
    assert (samples.tokens < 257).all()
    assert len(samples.texts) == 5
    files = {"tokens.npy", "samples.jsonl", "samples.txt", "view.html"}
    assert {p.name for p in Path(samples.folder).iterdir()} == files
    page = (Path(samples.folder) / "view.html").read_text()
    rows = json.loads(page.split('type="application/json">')[1].split("</script>")[0])["rows"]
    assert ["".join(text for text, _ in row["pieces"]) for row in rows] == samples.texts
    assert {step for row in rows for step in row["at"]} == {1, 2, 3}
    assert f"{samples.folder}/view.html" in caplog.text
    logged = client.download_artifacts(run.info.run_id, "samples/uniform-3-steps-seed-0/view.html")
    assert Path(logged).read_text() == page
    # Drawn two by two on two actors, and all at once here: the same samples.
    assert load_model(outcome.model).sample(5, steps=3, seed=0).numpy().tolist() == samples.tokens.tolist()


def test_artifacts_that_cannot_be_stored_do_not_fail_the_end(
    outcome: RunResult, config: RunConfig, client: MlflowClient, tmp_path: Path
):
    """The same end again, in an MLflow run whose artifacts belong into a folder that cannot be made."""
    (tmp_path / "file").write_text("in the way")
    place = client.create_experiment("no place", artifact_location=f"{tmp_path}/file/artifacts")
    run_id = client.create_run(place).info.run_id
    run = Run.of(config).with_data().replace(run_id=run_id)
    result = finish(run)
    assert result.version is None
    assert (result.references, result.value) == (outcome.references, outcome.value)
    assert client.get_run(run_id).data.metrics["reference/bigram"] == outcome.references["bigram"]


def test_another_config_is_refused_before_any_worker_starts(outcome: RunResult, config: RunConfig):
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.5})})
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.01 -> 0\.5"):
        launch.pretrain(other)


def test_more_workers_than_the_cluster_holds(config: RunConfig):
    wanted = tiny(Path(config.cluster.storage).parent, "crowded", cluster={"workers": 4})
    with pytest.raises(CapabilityError, match="4 workers of 1 CPUs, the cluster has room for 2"):
        launch.pretrain(wanted)


def test_storage_that_cannot_be_written(config: RunConfig, tmp_path: Path):
    (tmp_path / "file").write_text("")
    wanted = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"storage": str(tmp_path / "file" / "runs")})}
    )
    with pytest.raises(ConfigError, match=r"cluster\.storage"):
        launch.pretrain(wanted)


def test_sampling_without_a_model(config: RunConfig, run_storage: Path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        launch.sample(tiny(run_storage, "never-trained"))
