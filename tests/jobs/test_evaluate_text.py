"""The evaluation job on prepared text and a model written here, with a causal language model of others."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline import tracking
from pipeline.config.load import parse
from pipeline.config.model import PGMConfig
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import evaluate
from pipeline.metrics import likelihood
from pipeline.metrics.external_lm import Scorer
from pipeline.metrics.ngram import bigram_perplexity
from pipeline.metrics.text import distinct, unigram_entropy
from pipeline.models import model_folder
from pipeline.run import Run
from tests.support.causal_lm import save_scorer
from tests.support.one_process import measure
from tests.support.page_check import check_page
from tests.support.prepared_text import write_model, write_rows

L = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    storage = tmp_path_factory.mktemp("judged")
    scorer = save_scorer(tmp_path_factory.mktemp("scorer"), context=96)
    tree = {
        "name": "judged",
        "data": {"length": L, "validation_documents": 2, "shard_rows": 64, "streams": 4},
        "model": {"kind": "pgm", "hidden": 16, "heads": 2, "encoder_blocks": 1, "decoder_blocks": 1},
        "train": {"steps": 8, "batch": 8},
        "optim": {"warmup_steps": 2},
        "sampling": {"num_samples": 20, "steps": 4, "batch": 8, "top_p": 0.9},
        "evaluation": {"rows": 40, "draws": 2, "scorer": scorer},
        "cluster": {"storage": str(storage)},
    }
    config = parse(tree, origin="test")
    write_rows(config)
    assert isinstance(config.model, PGMConfig)
    write_model(config, config.model, storage / "judged" / "model")
    return config


@pytest.mark.slow
def test_figures_are_those_of_one_process(config: RunConfig, ray_cluster: None) -> None:
    uri, run = tracking.tracking_uri(config), Path(config.cluster.storage) / "judged"
    run_id = tracking.open_run(uri, "pgm", "judged", {}, {})
    (run / "run.json").write_text(json.dumps({"tracking_uri": uri, "run_id": run_id}))
    with tracking.Tracker(uri, run_id, run / "untracked.jsonl") as tracker:
        for step in (1, 2):
            tracker.log_metrics({"train/loss": 5.0 / step, "validation/perplexity": 9.0 / step}, step)
    found = evaluate(config)
    metrics = found.report.metrics()

    path = Run(config).data_path
    train, held_out = (ShardReader(path, Manifest.read(path), split) for split in ("train", "validation"))
    rows = held_out.rows(np.unique(np.linspace(0, len(held_out) - 1, 40).astype(int)))
    masking = likelihood.Masking("count", 2, 0)
    bound = measure(model_folder.read(run / "model")[0], masking, rows)
    assert metrics["evaluation/validation/nats"] == pytest.approx(bound.nats, rel=1e-6)

    tokens, decode = np.load(f"{found.folder}/samples/tokens.npy"), ByteTokenizer().decode
    real = held_out.rows(np.unique(np.linspace(0, len(held_out) - 1, 20).astype(int)))
    scorer = Scorer(str(config.evaluation.scorer), 32, 1)
    for key, some in (("samples", tokens), ("real", real)):
        told = {name.rpartition("/")[2]: value for name, value in metrics.items() if f"/{key}/" in name}
        seen = bigram_perplexity([train.rows(np.arange(len(train)))], [some], 257)
        assert told["bigram_perplexity"] == pytest.approx(seen)
        assert told["entropy"] == pytest.approx(unigram_entropy(some))
        assert told["distinct_2"] == distinct(some, 2)
        scored = scorer.score([decode(row) for row in some.tolist()])
        assert told["generative_perplexity"] == pytest.approx(scored.perplexity, rel=1e-5)
        assert math.isfinite(told["generative_perplexity"])

    pictures, text = check_page(Path(found.folder, "report.html").read_text())
    assert len(pictures) == 1, "the curves of the training that MLflow has"
    for said in ("samples 20, order uniform, steps 4, temperature 1.0, top_p 0.9, seed 0, precision float32",
                 "held-out text", "pydoc", "num_samples: 20", "The paper has no model of these sizes."):  # fmt: skip
        assert said in text
    assert config.cluster.storage not in text.split("Config")[-1]
    names = {Path(a.path).name for a in MlflowClient(uri).list_artifacts(run_id, "evaluation")}
    assert names == {"evaluation.json", "report.html", "report.md", "training.png", "samples.txt"}


def test_scorers_that_are_refused(config: RunConfig, tmp_path: Path, ray_cluster: None) -> None:
    for spec, says in [
        (save_scorer(tmp_path / "short", context=8), r"reads 8 tokens, .* up to \d+ of its tokens"),
        (str(tmp_path / "shrt"), "did you mean 'short'"),
    ]:
        asked = config.evaluation.model_copy(update={"scorer": spec})
        with pytest.raises(ConfigError, match=rf"evaluation\.scorer: .*{says}"):
            evaluate(config.model_copy(update={"evaluation": asked}))
