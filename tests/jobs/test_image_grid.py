"""The grid of images as its recipe runs it: a tiny override file, a folder of images, a published reference."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from jobs.evaluate import run
from pipeline.config.load import load
from pipeline.config.model import MDLMConfig
from pipeline.config.schema import RunConfig
from pipeline.data.prepare.images import TOKENIZER, read_pixels
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.comparison import compare
from pipeline.evaluation.source_images import load_net, source_images
from pipeline.metrics.image_features import FeatureNet
from pipeline.metrics.images import frechet_distance, inception_score, summarise
from pipeline.metrics.precision_recall import manifold, precision_recall
from pipeline.models import build, model_folder
from pipeline.models.vq import load_image_tokenizer
from pipeline.run import Run
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.support.image_helpers import make_images, write_folders
from tests.support.page_check import check_page
from tests.support.small_models import shake

RECIPE = Path(__file__).parents[2] / "configs/evaluate/imagenet_grid.yaml"
TINY = """
base: {recipe}
name: tiny-grid
data:
  {{source: {folder}/images, classes: 3, size: 8, factor: 4, tokenizer: patch, codes: 16, validation_images: 20,
    encoders: 1}}
model: {{hidden: 16, heads: 2, encoder_blocks: 1, decoder_blocks: 1, classes: 3}}
sampling: {{num_samples: 30, steps: 4, batch: 30, precision: fp32}}
evaluation:
  models: {{PGM 12-12: "{folder}/PGM", MaskGIT: "{folder}/MaskGIT"}}
  grid: {{guidance: [0, 2]}}
  steps: [2, 4]
  features: classifier
  reference: {folder}/reference.npz
  rows: 20
cluster: {{storage: {folder}, workers: 1, accelerator: cpu, cpus_per_worker: 1}}
"""
MASKGIT = MDLMConfig(kind="mdlm", hidden=16, heads=2, blocks=2, classes=3, registers=1)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[RunConfig, FeatureNet]:
    """The config of the override file, on prepared data, with two random models and a reference; and the net."""
    folder = tmp_path_factory.mktemp("grid")
    write_folders(folder / "images", *make_images(80))
    (folder / "tiny.yaml").write_text(TINY.format(recipe=RECIPE, folder=folder))
    config = load(folder / "tiny.yaml")
    data, prepared = config.data, Run(config).with_data()
    assert data.kind == "image"
    tokenizer = load_image_tokenizer(f"{prepared.data_path}/{TOKENIZER}", 4, 8, "cpu")
    for name, model in (("PGM", config.model), ("MaskGIT", MASKGIT)):
        facts = model_folder.DataFacts(16, 5, 17, None)
        weights = shake(build(model, 16, 5, 17)).state_dict()
        model_folder.write(folder / name, model, facts, weights, model_folder.Background({"step": 8}))
        tokenizer.save(folder / name)
    train = source_images(data, prepared.manifest).train
    net = load_net("classifier", None, data, train, config.evaluation.batch)
    pixels = read_pixels(train, data).images
    statistics = summarise([net(pixels)])[0]
    np.savez(folder / "reference.npz", mu=statistics.mean, sigma=statistics.covariance, arr_0=pixels[:40])
    return config, net


@pytest.mark.slow
def test_the_recipe_gives_the_figures_of_one_process(
    grid: tuple[RunConfig, FeatureNet], capsys: pytest.CaptureFixture[str]
) -> None:
    config, net = grid
    run(config)
    printed, folder = capsys.readouterr().out, Path(config.cluster.storage)
    report = folder / "tiny-grid/comparison"
    with open(report / "frontier.csv") as file:
        rows = list(csv.DictReader(file))
    points = [(row["model"], float(row["guidance"]), int(row["steps"])) for row in rows]
    assert points == [(m, w, s) for m in ("PGM 12-12", "MaskGIT") for w in (0, 2) for s in (2, 4)]
    assert "guidance  steps" in printed

    with np.load(folder / "reference.npz") as file:
        reference = {name: file[name] for name in file.files}
    tokenizer = load_image_tokenizer(str(folder / "PGM"), 4, 8, "cpu")
    labels = torch.arange(30) % 3
    for row, (name, guidance, steps) in zip(rows, points, strict=True):
        model = model_folder.read(folder / name.partition(" ")[0])[0]
        request = SamplingRequest(30, steps, 0, "halton", bos=17, guidance=guidance, condition=labels)
        seen = net(tokenizer.decode(sample(model, request).numpy()[:, 1:]))
        own, probabilities = summarise([seen])
        real = own.__class__(0, reference["mu"], reference["sigma"])
        assert float(row["fid"]) == pytest.approx(frechet_distance(own, real), rel=1e-3)
        assert float(row["inception_score"]) == pytest.approx(inception_score(probabilities)[0], rel=1e-3)
        hits = seen.probabilities.argmax(1) == labels.numpy()
        assert float(row["accuracy"]) == pytest.approx(hits.mean())
        of_images = manifold(net(reference["arr_0"]).features)
        expected = precision_recall(seen.features, of_images)
        assert (float(row["precision"]), float(row["recall"])) == pytest.approx(expected, abs=0.05)

    recorded = json.loads((folder / "tiny-grid/run.json").read_text())
    client = MlflowClient(recorded["tracking_uri"])
    names = {Path(a.path).name for a in client.list_artifacts(recorded["run_id"], "comparison")}
    assert names >= {"frontier.csv", "grid.png", "frontier.png", "report.html"}
    logged = client.get_metric_history(recorded["run_id"], "frontier/MaskGIT/guidance 2/fid")
    assert [(one.step, one.value) for one in logged] == [(int(r["steps"]), float(r["fid"])) for r in rows[6:]]
    pictures, text = check_page((report / "report.html").read_text())
    assert len(pictures) == 2
    assert "against reference.npz" in text


def changed(config: RunConfig, **evaluation: object) -> RunConfig:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})


@pytest.mark.slow
def test_what_is_refused_before_anything_is_drawn(grid: tuple[RunConfig, FeatureNet], tmp_path: Path) -> None:
    config, _ = grid
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match=r"has statistics of 2048 features, and .* 'classifier' gives 128"):
        compare(changed(config, reference=str(tmp_path / "inception.npz")))
    free = MASKGIT.model_copy(update={"classes": None})
    weights, facts = build(free, 16, 5, 17).state_dict(), model_folder.DataFacts(16, 5, 17, None)
    model_folder.write(tmp_path / "free", free, facts, weights, model_folder.Background())
    with pytest.raises(
        ConfigError, match=r"evaluation\.models\.free: (?s:.*)guidance: needs a model with classes"
    ):
        compare(changed(config, models={"free": str(tmp_path / "free")}))
