"""One sweep through Ray Tune, with a trial that raises and one that no cluster here can hold."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from ray.tune.experiment import Trial

from pipeline import storage
from pipeline.config.load import dump, load
from pipeline.config.sweep import Sweep, load_sweep
from pipeline.errors import CheckpointError
from pipeline.runtime.control_files import STOP
from pipeline.sweeps.summary import SweepResult
from pipeline.sweeps.sweep import planned, scheduler_of, sweep
from pipeline.sweeps.trial import read_reports
from tests.support.tiny_runs import tiny

CASES = {
    "plain": {"model.swap.pooling": "none"},
    "pooled": {"model.swap.pooling": "mean"},
    "weightless": {"train.init_from": "nowhere"},
    "crowded": {"cluster.workers": 4},
}


def write(folder: Path, storage_of_data: Path, **own: object) -> Path:
    """A sweep's file over a run of 8 steps that is judged twice."""
    train = {"validate_every": 4, "checkpoint_every": 4}
    base = tiny(storage_of_data, "base", train=train, cluster={"storage": str(folder)})
    (folder / "base.yaml").write_text(dump(base))
    file = folder / "sweep.yaml"
    default = {"name": "swept", "base": "base.yaml", "space": {"case": {"grid": CASES}}}
    file.write_text(yaml.safe_dump(default | own, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def plan(run_storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return load_sweep(write(tmp_path_factory.mktemp("sweep"), run_storage))


@pytest.fixture(scope="module")
def outcome(plan: Sweep) -> SweepResult:
    return sweep(plan)


@pytest.fixture(scope="module")
def client(outcome: SweepResult) -> MlflowClient:
    return MlflowClient(outcome.tracking_uri)


def children(client: MlflowClient, outcome: SweepResult) -> dict[str, MlflowRun]:
    """Runs under the sweep's, by variant."""
    parent = client.get_run(outcome.run_id)
    found = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{outcome.run_id}'")
    return {run.data.tags["variant"]: run for run in found}


@pytest.mark.slow
def test_two_variants_end_and_two_are_named_with_their_reason(outcome: SweepResult) -> None:
    state = {row.variant: row.state for row in outcome.rows}
    assert state["case=plain"] == state["case=pooled"] == "1 finished"
    assert state["case=crowded"] == "failed at step 0"
    assert state["case=weightless"].startswith("failed at step")
    assert (
        "case=crowded seed 0: cluster.workers: 4 workers of 1 CPUs, the cluster has room for 2"
        in outcome.table
    )
    assert "train.init_from: 'nowhere': no such folder" in outcome.table
    assert [row.variant for row in outcome.rows][2:] == ["case=weightless", "case=crowded"]


@pytest.mark.slow
def test_children_log_what_pretraining_logs(client: MlflowClient, outcome: SweepResult) -> None:
    runs = children(client, outcome)
    assert runs.keys() == {"case=plain", "case=pooled", "case=weightless"}
    for variant in ("case=plain", "case=pooled"):
        run = runs[variant]
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 8
        steps = [p.step for p in client.get_metric_history(run.info.run_id, "validation/perplexity")]
        assert sorted(steps) == [4, 8]
    assert runs["case=weightless"].info.status == "FAILED"
    assert runs["case=pooled"].data.params["model.swap.pooling"] == "mean"


@pytest.mark.slow
def test_parent_holds_the_space_the_table_and_the_pictures(
    client: MlflowClient, outcome: SweepResult
) -> None:
    parent = client.get_run(outcome.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials/finished"] == 2
    assert parent.data.metrics["trials/failed"] == 2
    assert "weightless" in parent.data.params["sweep.space"]
    names = {file.path for file in client.list_artifacts(outcome.run_id)}
    assert names >= {"table.md", "table.csv", "trials.csv", "best.yaml", "sweep.json"}
    pictures = [Path(file.path).name for file in client.list_artifacts(outcome.run_id, "figures")]
    assert len(pictures) == 3
    for name in pictures:
        assert (Path(outcome.folder) / name).stat().st_size > 5_000


@pytest.mark.slow
def test_table_says_what_the_trials_logged(client: MlflowClient, outcome: SweepResult) -> None:
    with (Path(outcome.folder) / "trials.csv").open() as file:
        lines = {line["case"]: line for line in csv.DictReader(file)}
    for variant, run in children(client, outcome).items():
        line = lines[variant.removeprefix("case=")]
        assert line["run_id"] == run.info.run_id
        if line["status"] == "finished":
            assert float(line["perplexity"]) == pytest.approx(run.data.metrics["validation/perplexity"])
    first = outcome.rows[0]
    assert first.parameters is not None
    assert first.sample_rate.mean > 0
    assert first.train_rate.mean > 0


@pytest.mark.slow
def test_the_best_is_a_config_of_pretraining(outcome: SweepResult, plan: Sweep) -> None:
    assert outcome.best is not None
    config = load(outcome.best)
    assert config.name == "swept-best"
    assert config.model.kind == "pgm"
    expected = CASES[outcome.rows[0].variant.removeprefix("case=")]["model.swap.pooling"]
    assert config.model.swap.pooling == expected
    assert config.cluster.storage == plan.base().cluster.storage


@pytest.mark.slow
def test_the_same_command_again_runs_only_what_failed(
    plan: Sweep, outcome: SweepResult, client: MlflowClient
) -> None:
    before = children(client, outcome)
    again = sweep(plan)
    after = children(client, outcome)
    assert again.run_id == outcome.run_id
    assert {v: r.info.run_id for v, r in after.items()} == {v: r.info.run_id for v, r in before.items()}
    for variant in ("case=plain", "case=pooled"):
        assert after[variant].info.end_time == before[variant].info.end_time
        assert len(client.get_metric_history(after[variant].info.run_id, "train/loss")) == 8
    assert after["case=weightless"].info.end_time > before["case=weightless"].info.end_time
    assert {row.variant: row.metric for row in again.rows[:2]} == {
        row.variant: row.metric for row in outcome.rows[:2]
    }


@pytest.mark.slow
def test_another_base_under_the_same_name_is_refused(plan: Sweep, outcome: SweepResult) -> None:
    tree = {**plan.tree, "optim": {**plan.tree["optim"], "lr": 0.5}}
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.01 -> 0\.5"):
        sweep(Sweep(plan.config, tree, plan.entries))


def test_halving_asks_the_worse_to_save_and_end(run_storage: Path, tmp_path: Path) -> None:
    """Ray Tune's rungs decide; the trial's own folder is told, and no process is ended."""
    file = write(tmp_path, run_storage, scheduler="asha", first_rung=4, reduction=2)
    plan = load_sweep(file)
    halving = scheduler_of(plan, 16)
    folders = []
    for index, perplexity in enumerate((10.0, 30.0, 5.0)):
        run = planned(plan, plan.variants()[index], 0).run.folder
        folders.append(run)
        trial = Trial("trial", trial_id=str(index), stub=True)
        halving.on_trial_add(None, trial)
        result = {"step": 4, "validation/perplexity": perplexity, "folder": run}
        assert halving.on_trial_result(None, trial, result) == "CONTINUE"
        late = {"step": 16, "validation/perplexity": perplexity, "folder": run}
        if index == 2:
            assert (
                halving.on_trial_result(None, trial, late) == "CONTINUE"
            )  # at the end nobody need be stopped
    assert [storage.exists(storage.join(run, STOP)) for run in folders] == [False, True, False]


@pytest.mark.slow
def test_reports_are_kept_beside_the_trial(plan: Sweep, outcome: SweepResult) -> None:
    run = planned(plan, plan.variants()[0], 0).run.folder
    told = read_reports(run)
    assert [report["step"] for report in told] == [4, 8]
    assert json.loads(Path(run, "trial.json").read_text())["status"] == "finished"
