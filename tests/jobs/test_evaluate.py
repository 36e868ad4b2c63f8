"""The evaluation job on prepared data and models that are written here: its figures against one process's."""

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline.config.load import parse
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare.image_sources import list_images, open_images
from pipeline.data.prepare.images import TOKENIZER, content, held_out, read_pixels
from pipeline.data.shards import ShardReader
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation.comparison import compare
from pipeline.evaluation.drawn_images import ImageMeasurer
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.source_images import load_net, source_images
from pipeline.metrics import likelihood
from pipeline.metrics.images import frechet_distance, summarise
from pipeline.models import build, model_folder
from pipeline.models.vq import PatchVQ, fit_patches, load_image_tokenizer
from pipeline.run import Run
from pipeline.tracking import tracking_uri
from pipeline.training.validation import validation_rows
from tests.support.one_process import measure
from tests.support.page_check import check_page
from tests.support.small_manifest import small_manifest, write_shard
from tests.support.small_models import shake

CODES = 16


def digits(storage: Path, **changes: dict[str, object]) -> RunConfig:
    """Digits as 2 x 2 codes of 4 x 4 pixels; most of them held out, so that the classifier is soon fitted."""
    tree: dict[str, dict[str, object]] = {
        "data": {"kind": "image", "factor": 4, "codes": CODES, "validation_images": 1397, "streams": 4},
        "model": {"kind": "pgm", "hidden": 16, "heads": 2, "encoder_blocks": 1, "decoder_blocks": 1},
        "diffusion": {"schedule": "arccos"},
        "optim": {"warmup_steps": 2},
        "train": {"steps": 8, "batch": 8},
        "evaluation": {"rows": 300, "draws": 2, "batch": 64},
        "sampling": {"num_samples": 120, "steps": 3, "order": "halton", "guidance": 1.0, "batch": 120},
        "cluster": {"storage": str(storage), "workers": 2},
    }
    tree["model"] |= {"classes": 10, "registers": 2, "dropout": 0}
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return parse({"name": "judged", **tree}, origin="test")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with prepared data and a random model, as preparation and training would leave them."""
    config = digits(tmp_path_factory.mktemp("runs"))
    data, path = config.data, Run(config).data_path
    assert data.kind == "image"
    source = open_images(data)
    refs = list_images(source, data).refs
    out = held_out(np.arange(len(refs)), data.validation_images, len(refs))
    pixels = read_pixels(refs, data)
    tokenizer = fit_patches(pixels.images[~out], CODES, 4, seed=0)
    rows = np.concatenate([np.full((len(refs), 1), CODES + 1), tokenizer.encode(pixels.images)], axis=1)
    files = [
        write_shard(path, f"{split}-00000.parquet", rows[mine].astype(np.uint8), pixels.labels[mine])
        for split, mine in (("train", ~out), ("validation", out))
    ]
    manifest = small_manifest(
        files,
        length=5,
        vocabulary=CODES,
        special={"eot": None, "bos": CODES + 1},
        tokenizer={"name": tokenizer.name, "hash": tokenizer.hash},
        source=source.info,
        content=content(data),
        documents=len(refs),
        classes=10,
        grid=2,
    )
    manifest.publish(path)
    tokenizer.save(Path(path) / TOKENIZER)
    write_model(config, tokenizer, Path(config.cluster.storage) / "judged" / "model")
    return config


def write_model(config: RunConfig, tokenizer: PatchVQ, into: Path) -> None:
    model = shake(build(config.model, CODES, 5, CODES + 1))
    facts = model_folder.DataFacts(CODES, 5, CODES + 1, None)
    model_folder.write(into, config.model, facts, model.state_dict(), model_folder.Background({"step": 8}))
    tokenizer.save(into)


@pytest.mark.slow
def test_figures_are_those_of_one_process(config: RunConfig, ray_cluster: None) -> None:
    data, path = config.data, Run(config).data_path
    assert data.kind == "image"
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"data": (path,)})})
    found = evaluate(config)
    metrics = found.report.metrics()

    manifest = Manifest.read(path)
    reader = ShardReader(path, manifest, "validation")
    rows = validation_rows(len(reader), 300)
    model = model_folder.read(Path(config.cluster.storage) / "judged" / "model")[0]
    masking = likelihood.Masking("arccos", 2, 0, bos=True, batch=64)
    bound = measure(model, masking, reader.rows(rows), reader.labels(rows))
    other = f"evaluation/zero_shot/{Path(path).name}/loss"
    assert metrics["evaluation/validation/loss"] == metrics[other] == bound.nats
    assert metrics["evaluation/validation/loss_low"] == pytest.approx(
        bound.nats - 1.96 * bound.stderr, rel=1e-4
    )

    source = source_images(data, manifest)
    assert (len(source.train), len(source.validation)) == (400, 1397)
    net = load_net(None, None, data, source.train, 64)
    looker = ImageMeasurer(net, f"{path}/{TOKENIZER}", data, 1)
    reference = summarise([net(read_pixels(source.train, data).images)])[0]
    tokens = np.load(f"{found.folder}/samples/tokens.npy")
    seen = looker.drawn(tokens[:, 1:])
    distance = frechet_distance(summarise([seen])[0], reference)
    assert metrics["evaluation/samples/fid"] == pytest.approx(distance, rel=1e-3)
    assert seen.probabilities is not None
    right = (seen.probabilities.argmax(1) == np.arange(120) % 10).mean()
    assert metrics["evaluation/samples/accuracy"] == pytest.approx(right)
    looked = looker.held_out([source.validation[i] for i in rows])
    assert looked is not None
    assert metrics["evaluation/tokenizer/mse"] == pytest.approx(
        looked.difference.squares / looked.difference.values
    )
    # Real images are nearest, what the codes keep of them is further, and a random model's furthest.
    fids = [metrics[f"evaluation/{whose}/fid"] for whose in ("real", "tokenizer", "samples")]
    assert fids == sorted(fids)
    assert metrics["evaluation/real/accuracy"] > 0.85

    run = json.loads((Path(found.folder).parent / "run.json").read_text())
    client = MlflowClient(tracking_uri(config))
    logged = client.get_run(run["run_id"])
    assert logged.info.status == "FINISHED"
    assert {key: logged.data.metrics[key] for key in metrics} == metrics
    names = {Path(a.path).name for a in client.list_artifacts(run["run_id"], "evaluation")}
    assert names == {"evaluation.json", "report.html", "report.md", "samples.png", "held_out.png"}
    assert "guidance 1.0, seed 0, precision float32" in found.report.to_text()

    # A comparison judges alike, whichever model it draws from first.
    own = str(Path(config.cluster.storage) / "judged" / "model")
    asked = config.evaluation.model_copy(update={"data": (), "models": {"A": own, "B": own}, "steps": (2, 3)})
    both = compare(config.model_copy(update={"name": "both", "evaluation": asked}))
    a, b = ([one for one in both.points if one.model == name] for name in "AB")
    assert [one.steps for one in a] == [one.steps for one in b] == [2, 3]
    assert [one.value("fid") for one in a] == [one.value("fid") for one in b]
    assert a[1].value("fid") == pytest.approx(metrics["evaluation/samples/fid"], rel=1e-3)
    assert [group.measures[0].value for group in both.likelihoods] == [pytest.approx(bound.nats)] * 2
    check_page(Path(both.folder, "report.html").read_text())


def test_what_is_refused_before_anything_is_drawn(
    config: RunConfig, tmp_path: Path, ray_cluster: None
) -> None:
    def changed(**sections: dict[str, object]) -> RunConfig:
        return config.model_copy(
            update={key: getattr(config, key).model_copy(update=keys) for key, keys in sections.items()}
        )

    tokenizer = load_image_tokenizer(f"{Run(config).data_path}/{TOKENIZER}", 4, 8, "cpu")
    assert isinstance(tokenizer, PatchVQ)
    patches = tokenizer.decode(np.arange(CODES)[:, None])
    patches[0] += 1
    write_model(config, PatchVQ(patches), tmp_path / "other")
    write_model(config, tokenizer, tmp_path / "cut")
    weights = tmp_path / "cut" / model_folder.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])
    for wanted, kind, says in [
        (changed(sampling={"model": str(tmp_path / "cut")}), CheckpointError, "model.safetensors is damaged"),
        (changed(sampling={"model": str(tmp_path / "none")}), CheckpointError, "no such folder or file"),
        (
            changed(sampling={"model": str(tmp_path / "other")}),
            DataError,
            "tokenizer \\(hash\\): the data has",
        ),
        (changed(sampling={"num_samples": 3}), ConfigError, "sampling.num_samples: 3; expected at least 4"),
        (changed(evaluation={"rows": 3}), ConfigError, "evaluation.rows: 3 held-out images; expected"),
        (changed(evaluation={"reference": "none.npz"}), ConfigError, "reference: 'none.npz' does not exist"),
        (changed(evaluation={"data": (str(tmp_path),)}), DataError, "no manifest.json"),
        (changed(evaluation={"features": "inceptoin"}), ConfigError, "did you mean 'inception'"),
    ]:
        with pytest.raises(kind, match=says):
            evaluate(wanted)
        assert not list(tmp_path.glob("**/samples"))
