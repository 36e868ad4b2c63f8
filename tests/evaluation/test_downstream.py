"""Tasks of lm-evaluation-harness through the evaluation job: one table, with accuracy above chance."""

from pathlib import Path

import datasets
import pytest
from mlflow import MlflowClient

from pipeline import storage, tracking
from pipeline.config.load import parse
from pipeline.config.model import ARConfig, MDLMConfig
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.downstream import Accuracy, downstream
from tests.support.harness_task import write_task
from tests.support.page_check import check_page
from tests.support.prepared_text import write_model

QUESTIONS = [{"context": f"{i} ", "choices": ["a", "b", "c", "d"], "label": i % 4} for i in range(6)]


def config_of(root: Path, **evaluation: object) -> RunConfig:
    tree = {
        "name": "questions",
        "data": {"length": 16},
        "model": {"kind": "pgm", "hidden": 16, "heads": 2, "encoder_blocks": 1, "decoder_blocks": 1},
        "sampling": {"steps": 4},
        "evaluation": {
            "tasks": ["continuation"],
            "tasks_path": str(root / "task"),
            "draws": 2,
            "models": {"PGM": str(root / "pgm"), "MDLM": str(root / "mdlm"), "AR": str(root / "ar")},
            **evaluation,
        },
        "cluster": {"storage": str(root / "runs")},
    }
    return parse(tree, "test")


@pytest.mark.slow
def test_one_table_for_models_of_every_kind(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path / "task", QUESTIONS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = config_of(tmp_path, task_limit=5)
    size = {"hidden": 16, "heads": 2, "blocks": 1}
    models = {"pgm": config.model, "mdlm": MDLMConfig(kind="mdlm", **size), "ar": ARConfig(kind="ar", **size)}
    for name, model in models.items():
        write_model(config, model, tmp_path / name)
    result = downstream(config)
    assert result.table["model"].tolist() == ["PGM", "MDLM", "AR"]
    assert set(result.table["chance"]) == {"25.0%"}
    assert set(result.table["questions"]) == {"5"}
    check_page(storage.read_text(storage.join(result.folder, "report.html")))
    recorded = tracking.recorded_run(str(tmp_path / "runs" / "questions"))
    assert recorded
    metrics = MlflowClient(recorded[1]).get_run(recorded[0]).data.metrics
    accuracy = metrics["evaluation/downstream/AR/continuation/accuracy"]
    assert accuracy * 5 == pytest.approx(round(accuracy * 5))
    assert metrics["evaluation/downstream/AR/continuation/above_chance"] == pytest.approx(
        (accuracy - 0.25) / 0.75
    )


def test_above_chance() -> None:
    result = Accuracy(0.4, 0.03, 0.25, 100)
    assert (result.above_chance, result.above_chance_stderr) == pytest.approx((0.2, 0.04))


def test_an_unknown_task_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation.tasks: 'hellaswg' is no task.*did you mean 'hellaswag'"
    ):
        downstream(config_of(tmp_path, tasks=["hellaswg"], tasks_path=None))
