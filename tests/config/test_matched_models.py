"""Models that are compared differ in what they are compared for, and in nothing else."""

from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.config.sweep import load_sweep
from pipeline.models import build

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("pgm", "causal", "mdlm", "complementary", "ar")


def test_matched_parameters_equal_tokens_one_corpus() -> None:
    compared = load(CONFIGS / "evaluate/compare.yaml")
    files = [CONFIGS / f"text/compare_{name}.yaml" for name in NAMES]
    runs = [load(file) for file in files]
    assert [f"runs/{run.name}/model" for run in runs] == list(compared.evaluation.models.values())
    counts = []
    for file, run in zip(files, runs, strict=True):
        assert run.data == compared.data
        same = runs[0].train.steps, runs[0].train.batch, runs[0].optim
        assert (run.train.steps, run.train.batch, run.optim) == same
        tokens = run.train.steps * run.train.batch * run.data.length
        parameters = sum(p.numel() for p in build(run.model, 257, run.data.length).parameters())
        assert f"({parameters:,} parameters, {tokens:,} tokens)" in file.read_text().partition("\n")[0]
        counts.append(parameters)
    assert max(counts) == pytest.approx(min(counts), rel=0.02)


def test_the_comparison_of_images_reads_the_models_of_its_sweep() -> None:
    compared, sweep = load(CONFIGS / "evaluate/fashion.yaml"), load_sweep(CONFIGS / "sweep/fashion.yaml")
    trials = [(variant, seed) for variant in sweep.variants() for seed in sweep.config.seeds]
    expected = {
        f"{variant.label.removeprefix('model=')} seed {seed}": f"runs/{sweep.config.name}/"
        f"{sweep.trial(variant, seed).name}/model"
        for variant, seed in trials
    }
    assert compared.evaluation.models == expected
    assert all(sweep.trial(variant, seed).data == compared.data for variant, seed in trials)
    parameters = [
        sum(p.numel() for p in build(sweep.trial(variant, 0).model, 512, 50, 513).parameters())
        for variant in sweep.variants()
    ]
    assert max(parameters) == pytest.approx(min(parameters), rel=0.06)
