"""The whole benchmark at its tiny size: figures that add up, a table that parses, an MLflow run that has it."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from pipeline.benchmarks.benchmark import BenchmarkResult, benchmark
from pipeline.benchmarks.roofline import Place
from pipeline.benchmarks.speed import measure
from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import parse_section, read_tree
from pipeline.errors import ConfigError
from pipeline.models import build

CONFIGS = Path(__file__).parents[2] / "configs" / "benchmark"
TINY, CPU, GPU = CONFIGS / "tiny.yaml", CONFIGS / "cpu.yaml", CONFIGS / "gpu.yaml"


def load(path: Path, *overrides: str) -> BenchmarkConfig:
    return parse_section(BenchmarkConfig, read_tree(path), str(path), overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResult:
    storage = tmp_path_factory.mktemp("benchmark")
    return benchmark(load(TINY, f"storage={storage}", "trace=true", "tracking.uri=null"))


def test_figures_add_up(finished: BenchmarkResult) -> None:
    config = finished.report.config
    for result in finished.report.results:
        assert len(result.seconds) == 2
        assert all(
            s == pytest.approx(sum(p.values())) for s, p in zip(result.seconds, result.phases, strict=True)
        )
        assert sum(result.split.values()) == pytest.approx(1)
        assert result.tokens == result.sequences * config.length
        if result.flops is not None:
            assert 0 < (result.share_of_roofline or 0) < 1.2
            assert all(0 < share < 1.2 for share in result.share_of_peak)
    own = [result.label for result in finished.report.results if result.flops is not None]
    assert own == [
        "training pgm",
        "training mdlm",
        "sampling pgm",
        "sampling pgm refresh_every 4",
        "sampling causal",
        "sampling causal 4 steps",
        "sampling mdlm",
    ]
    assert finished.report.peak > 1e8
    assert 0 <= (finished.report.data_wait or 0) < 1


def test_the_files_hold_the_figures(finished: BenchmarkResult) -> None:
    folder = Path(finished.folder)
    with (folder / "benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [result.label for result in finished.report.results]
    for row, result in zip(rows, finished.report.results, strict=True):
        assert float(row["s/batch"]) == result.median
        assert float(row["tokens/s"]) == pytest.approx(
            float(row["sequences/s"]) * finished.report.config.length
        )
    lines = (folder / "benchmark.md").read_text().splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert sum(cells[0].rstrip(" |") == "training pgm" for cells in table) == 2, "cases, phases"
    assert any(
        cells[0] == "sampling pgm over sampling mdlm plain" and cells[4] in ("yes", "no") for cells in table
    )
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "traces").glob("*.json.gz"))) == len(rows)


def test_mlflow_has_the_run(finished: BenchmarkResult) -> None:
    client = MlflowClient(finished.tracking_uri)
    run = client.get_run(finished.run_id)
    assert run.info.status == "FINISHED"
    expected = {key: pytest.approx(value) for key, value in finished.report.metrics().items()}
    assert run.data.metrics == expected
    assert {file.path for file in client.list_artifacts(finished.run_id)} == {
        "benchmark.md",
        "benchmark.csv",
        "benchmark.png",
        "steps.png",
    }


def test_the_two_models_of_the_size_to_compare_have_equal_parameters() -> None:
    config = load(CPU)
    counts = {
        name: sum(p.numel() for p in build(model, config.vocabulary, config.length).parameters())
        for name, model in config.models.items()
    }
    assert counts["mdlm_16"] == pytest.approx(counts["pgm"], rel=0.02)
    assert counts["mdlm"] < 0.9 * counts["pgm"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "training=[{model: pmg}]",
            "model 'pmg' of 'training pmg' is none of pgm, causal, mdlm, ar.*did you mean 'pgm'",
        ),
        ("training=[{model: mdlm, form: dense}]", "form dense of 'mdlm'; expected a bidirectional pgm"),
        ("sampling=[{model: pgm, form: plain}]", "form plain is of kind mdlm, not of pgm"),
        ("sampling=[{model: mdlm, refresh_every: 2}]", "refresh_every is of kind pgm"),
        ("sampling=[{model: causal, refresh_every: 2}]", "kind pgm with a bidirectional encoder"),
        ("sampling=[{model: ar}]", "kind ar draws one token a step; expected order left_to_right"),
        ("sampling=[{model: causal, steps: 65}]", "steps 65 for rows of 64"),
        ("ratios=[{of: training pgm, over: training}]", "ratio with 'training', which is no case; known: "),
        ("models.pgm.hiden=8", "hiden: no such key .*did you mean 'hidden'"),
        ("steps=65", "steps 65 for rows of 64"),
        ("clock=sun", "'sun' is not one of wall, cpu"),
        ("compile=true", "compile: true for device cpu, where it does not pay"),
    ],
)
def test_what_cannot_be_measured_is_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(TINY, override)


def test_half_precision_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "cube", 64)  # CPUs without bf16 take minutes for the large product
    words = ["precision=bf16", "training=[{model: pgm}]", "sampling=[{model: causal}]", "ratios=[]"]
    measured = measure(load(TINY, *words))
    assert [result.label for result in measured.results] == ["training pgm", "sampling causal"]
    assert all(len(result.roofline) == 2 and result.median > 0 for result in measured.results)
    assert min(measured.copies) > 1e7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device: 'gpu', but torch finds no CUDA device"):
        benchmark(load(GPU, f"storage={tmp_path}", "tracking.uri=null"))
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ConfigError, match="clock: cpu for device gpu"):
        load(GPU, "clock=cpu")


def test_configs_name_their_command() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert f"python -m jobs.benchmark configs/benchmark/{path.name}" in path.read_text()
        assert yaml.safe_load(path.read_text())["name"] == path.stem
