"""The zero-shot job: texts are prepared with the model's tokenizer, and measured by all estimators."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import storage, tracking
from pipeline.config.load import parse
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation.zero_shot import ZeroShot, zero_shot
from pipeline.metrics.likelihood import Masking
from pipeline.models import build, model_folder
from pipeline.training.validation import validation_rows
from tests.support.data_helpers import write_parquet, write_sentences
from tests.support.one_process import measure
from tests.support.page_check import check_page
from tests.support.prepared_text import write_model
from tests.support.small_models import shake

L, ROWS = 16, 50
MODELS = {
    "pgm": {"kind": "pgm", "hidden": 16, "heads": 2, "encoder_blocks": 1, "decoder_blocks": 1},
    "ar": {"kind": "ar", "hidden": 16, "heads": 2, "blocks": 1},
}
Result = tuple[RunConfig, ZeroShot]


def config_of(root: Path, kind: str, **evaluation: object) -> RunConfig:
    """Two texts: Parquet with a split in the files' names, and lines of JSON. The run's own data is not read."""
    sets = {
        "hub": {"source": f"hf:{root / 'hub'}", "text_filter": "ptb"},
        "lines": {"source": str(root / "lines.jsonl"), "end_of_text": True},
    }
    tree = {
        "name": kind,
        "data": {"length": L, "source": "nothing here"},
        "model": MODELS[kind],
        "sampling": {
            "steps": L if kind == "ar" else 4,
            "order": "left_to_right" if kind == "ar" else "uniform",
        },
        "evaluation": {"rows": ROWS, "draws": 2, "batch": 8, "zero_shot": sets, **evaluation},
        "cluster": {"storage": str(root / "runs")},
    }
    return parse(tree, "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts, which the first model prepares for all."""
    root = tmp_path_factory.mktemp("texts")
    texts = write_sentences(root / "lines.jsonl", 40)
    write_parquet(root / "hub" / "test-00000-of-00001.parquet", [f" {text}" for text in texts])
    write_parquet(root / "hub" / "train-00000-of-00001.parquet", ["never read"] * 50)
    return root


@pytest.fixture(scope="module", params=MODELS)
def result(request: pytest.FixtureRequest, root: Path, ray_cluster: None) -> Result:
    """An evaluation of a model that is written here."""
    config = config_of(root, request.param)
    write_model(config, config.model, root / "runs" / request.param / "model")
    return config, zero_shot(config)


def test_figures_are_those_of_one_process(result: Result) -> None:
    config, judged = result
    model = model_folder.read(Path(config.cluster.storage) / config.name / "model")[0]
    groups = {(group.key, str(group.how["estimator"])): group for group in judged.report.groups}
    estimators = ["exact"] if config.name == "ar" else ["count", "mdlm"]
    assert [*groups] == [
        (f"zero_shot/{name}", estimator) for name in ("hub", "lines") for estimator in estimators
    ]
    for (_, estimator), group in groups.items():
        path = storage.join(config.cluster.storage, "data", str(group.how["data"]))
        manifest = Manifest.read(path)
        assert [*manifest.splits] == ["validation"]
        assert manifest.documents == 40
        reader = ShardReader(path, manifest, "validation")
        draws = 1 if estimator == "exact" else 2
        rows = reader.rows(validation_rows(len(reader), ROWS))
        expected = measure(model, Masking(estimator, draws, config.seed, batch=8), rows)
        assert group.measures[0].value == pytest.approx(expected.perplexity, rel=1e-5)


def test_the_sets_are_prepared_as_they_say(result: Result) -> None:
    config, judged = result
    data = {group.key: str(group.how["data"]) for group in judged.report.groups}
    paths = (
        storage.join(config.cluster.storage, "data", data[f"zero_shot/{name}"]) for name in ("hub", "lines")
    )
    joined, ended = (
        ShardReader(path, Manifest.read(path), "validation").rows(range(40)).ravel() for path in paths
    )
    assert 256 not in joined  # documents are not separated
    assert 256 in ended


def test_table_page_and_mlflow(result: Result) -> None:
    config, judged = result
    assert judged.table["text"].tolist() == ["hub", "lines"]
    name = "exact" if config.name == "ar" else "mdlm"
    assert {f"perplexity ({name})", f"95% interval ({name})", "rows"} <= {*judged.table.columns}
    check_page(storage.read_text(storage.join(judged.folder, "report.html")))
    recorded = tracking.recorded_run(storage.join(config.cluster.storage, config.name))
    assert recorded
    metrics = MlflowClient(recorded[1]).get_run(recorded[0]).data.metrics
    value = judged.report.groups[0].measures[0].value
    estimator = judged.report.groups[0].how["estimator"]
    assert metrics[f"evaluation/zero_shot/hub/perplexity_{estimator}"] == pytest.approx(value)


def test_a_model_of_padded_rows_reads_texts_as_sentences(tmp_path: Path, ray_cluster: None) -> None:
    write_sentences(tmp_path / "lines.jsonl", 20)
    config = config_of(tmp_path, "pgm")
    sets = {"lines": config.evaluation.zero_shot["lines"].model_copy(update={"end_of_text": False})}
    evaluation = config.evaluation.model_copy(update={"zero_shot": sets})
    data = config.data.model_copy(update={"wrap": "sentence"})
    config = config.model_copy(update={"data": data, "evaluation": evaluation})
    facts = model_folder.DataFacts(257, L, 256, 256, pad=256, row_lengths=(0,) * 8 + (1,))
    model = shake(build(config.model, 257, L, 256))
    folder = tmp_path / "runs" / "pgm" / "model"
    model_folder.write(folder, config.model, facts, model.state_dict(), model_folder.Background())
    ByteTokenizer().save(folder)
    assert zero_shot(config).table["rows"].tolist() == ["20"]  # one row for each sentence


def test_images_have_no_zero_shot_texts(tmp_path: Path) -> None:
    config = config_of(tmp_path, "pgm")
    tree = {"data": {"kind": "image"}, "train": {"batch": 8}, "name": "i", "sampling": {"steps": 4}}
    images = parse(tree, "test").data
    with pytest.raises(ConfigError, match=r"evaluation.zero_shot: texts, but data.kind is image"):
        zero_shot(config.model_copy(update={"data": images}))
