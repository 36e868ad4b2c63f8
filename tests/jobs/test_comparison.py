"""The comparison of several models on prepared text: its figures, its files, and models that it refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline import tracking
from pipeline.config.load import parse
from pipeline.config.model import ARConfig, MDLMConfig, ModelConfig, PGMConfig
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import ShardReader
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation.comparison import compare
from pipeline.metrics import likelihood
from pipeline.metrics.ngram import bigram_perplexity
from pipeline.metrics.text import unigram_entropy
from pipeline.models import model_folder
from pipeline.run import Run
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.support.one_process import measure
from tests.support.page_check import check_page
from tests.support.prepared_text import write_model, write_rows

MODELS: dict[str, ModelConfig] = {
    "PGM": PGMConfig(hidden=16, heads=2, encoder_blocks=1, decoder_blocks=1, dropout=0),
    "MDLM": MDLMConfig(kind="mdlm", hidden=16, heads=2, blocks=2, dropout=0),
    "AR": ARConfig(kind="ar", hidden=16, heads=2, blocks=1, dropout=0),
}
L = 16


def settings(storage: Path, models: dict[str, str], **more: object) -> RunConfig:
    tree = {
        "name": "compared",
        "data": {"length": L, "validation_documents": 2, "shard_rows": 64, "streams": 4},
        "train": {"steps": 8, "batch": 8},
        "optim": {"warmup_steps": 2},
        "sampling": {"num_samples": 20, "steps": 4, "batch": 8},
        "evaluation": {"models": models, "steps": [4, 2], "rows": 40, "draws": 2, "batch": 32, **more},
        "cluster": {"storage": str(storage), "workers": 2},
    }
    return parse(tree, origin="test")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Three models with runs in MLflow; the third was registered."""
    storage = tmp_path_factory.mktemp("compared")
    places = {name: str(storage / name / "model") for name in MODELS}
    config = settings(storage, places)
    write_rows(config)
    uri = tracking.tracking_uri(config)
    for number, (name, model) in enumerate(MODELS.items()):
        write_model(config, model, Path(places[name]))
        run_id = tracking.open_run(uri, "pgm", name, {}, {})
        told = {"run_id": run_id, "tracking_uri": uri}
        (storage / name / "run.json").write_text(json.dumps(told))
        with tracking.Tracker(uri, run_id, storage / "untracked.jsonl") as tracker:
            for step in (2, 4):
                values = {"train/tokens_per_second": 64.0 * (number + 1)}
                tracker.log_metrics(values | {"validation/perplexity": 40.0 / step + number}, step)
    tracking.register_model(uri, run_id, Path(places["AR"]), "causal", {})
    tracking.set_alias(uri, "causal", "teacher", "1")
    return settings(storage, places | {"AR": "models:/causal@teacher"})


@pytest.mark.slow
def test_figures_and_files(config: RunConfig, ray_cluster: None) -> None:
    found = compare(config)
    asked = [("PGM", 2), ("PGM", 4), ("MDLM", 2), ("MDLM", 4), ("AR", L)]
    assert [(one.model, one.steps) for one in found.points] == asked

    # Figures are those of one process.
    manifest = Manifest.read(Run(config).data_path)
    train, held_out = (ShardReader(Run(config).data_path, manifest, s) for s in ("train", "validation"))
    seen = train.rows(np.arange(len(train)))
    for one in found.points:
        model = model_folder.read(Path(config.cluster.storage) / one.model / "model")[0]
        order = "left_to_right" if one.model == "AR" else "uniform"
        rows = sample(model, SamplingRequest(20, one.steps, 0, order)).numpy()
        assert one.value("bigram_perplexity") == pytest.approx(bigram_perplexity([seen], [rows], 257))
        assert one.value("entropy") == pytest.approx(unigram_entropy(rows))
        assert len(one.rates) == 5
        assert min(one.rates) <= one.speed <= max(one.rates)
    for name, group in zip(MODELS, found.likelihoods, strict=True):
        model = model_folder.read(Path(config.cluster.storage) / name / "model")[0]
        estimator, draws = likelihood.estimator_for(model, "count", 2)
        rows = held_out.rows(np.unique(np.linspace(0, len(held_out) - 1, 40).astype(int)))
        bound = measure(model, likelihood.Masking(estimator, draws, 0, batch=32), rows)
        assert group.title == name
        assert group.measures[1].value == pytest.approx(bound.nats, rel=1e-6)

    # 8 rows of 16 tokens a step at 64 tokens/s are two seconds a step, half of it for the second run.
    assert [list(one.seconds) for one in found.curves] == [[4, 8], [2, 4], [4 / 3, 8 / 3]]
    assert [list(one.tokens) for one in found.curves] == [[256, 512]] * 3
    assert [list(one.values) for one in found.curves] == [[20, 10], [21, 11], [22, 12]]

    with open(f"{found.folder}/frontier.csv") as file:
        told = list(csv.DictReader(file))
    assert [(row["model"], int(row["steps"])) for row in told] == asked
    assert [float(row["tokens_per_second"]) for row in told] == [one.speed for one in found.points]
    with open(f"{found.folder}/convergence.csv") as file:
        assert [row["perplexity"] for row in csv.DictReader(file)][:2] == ["20.0", "10.0"]
    run = json.loads((Path(found.folder).parent / "run.json").read_text())
    client = MlflowClient(found.tracking_uri)
    names = {Path(a.path).name for a in client.list_artifacts(run["run_id"], "comparison")}
    assert names == {"report.html", "report.md", "frontier.png", "convergence.png", "frontier.csv",
                     "convergence.csv"}  # fmt: skip
    pictures, text = check_page(Path(found.folder, "report.html").read_text())
    assert len(pictures) == 2
    assert "AR, 16 steps" in text
    history = tracking.metric_history(found.tracking_uri, run["run_id"], ["frontier/PGM/bigram_perplexity"])
    expected = [(one.steps, one.value("bigram_perplexity")) for one in found.points[:2]]
    assert history["frontier/PGM/bigram_perplexity"] == expected
    assert client.get_run(run["run_id"]).info.status == "FINISHED"


def test_models_that_are_refused_by_name(config: RunConfig, tmp_path: Path, ray_cluster: None) -> None:
    write_model(config, MODELS["PGM"], tmp_path / "short", length=8)
    (tmp_path / "step_00000004").mkdir()
    (tmp_path / "step_00000004" / "state.json").write_text("{}")
    good = {"good": config.evaluation.models["PGM"]}
    place = str(tmp_path / "short")
    cases: list[tuple[str, str, type[Exception], str]] = [
        ("odd", place, DataError, r"evaluation\.models\.odd: .*\n  length: the data has 16, the model 8"),
        (
            "odd",
            str(tmp_path / "shrt"),
            CheckpointError,
            r"models\.odd: .*no such folder or file; did you mean 'short'",
        ),
        ("odd", "models:/causl@teacher", CheckpointError, r"models\.odd: .*did you mean 'causal'"),
        ("odd", str(tmp_path / "step_00000004"), CheckpointError, r"models\.odd: .*no model\.safetensors"),
    ]
    for name, spec, kind, says in cases:
        with pytest.raises(kind, match=f"(?s){says}"):
            compare(settings(Path(config.cluster.storage), good | {name: spec}))


def test_configs_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.steps: \[17\] for 16 predicted tokens a row"):
        settings(tmp_path, {"a": "x"}, steps=[4, 17])
    with pytest.raises(ConfigError, match=r"evaluation\.steps: \[\] for 16 predicted"):
        settings(tmp_path, {"a": "x"}, steps=[])
    with pytest.raises(ConfigError, match=r"evaluation\.models"):
        settings(tmp_path, {"a/b": "x"})
    assert settings(tmp_path, {}, steps=[4, 17]).evaluation.steps == (4, 17)
