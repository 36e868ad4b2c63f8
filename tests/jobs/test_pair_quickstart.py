"""The recipe of images with captions, shortened, and its four uses by command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import Model, load_model
from pipeline.config.load import load
from pipeline.data.tokenizers import PairTokenizer
from pipeline.evaluation.comparison import compare
from pipeline.evaluation.drawn_pairs import draw_candidates
from pipeline.training.validation import validation_rows
from tests.support.digit_pairs import LIKELIEST, Digits, captions_of_images, images_of_captions, split
from tests.support.in_process import run_job
from tests.support.launched import ROOT, job_output
from tests.support.page_check import check_page

CONFIG = str(ROOT / "configs/pair/quickstart.yaml")


def run(job: str, storage: Path, *words: str) -> str:
    """Output of a job, run in this process, whose Ray is up."""
    done = run_job(job, CONFIG, f"cluster.storage={storage}", *words)
    assert done.code == 0, done.stderr[-6000:]
    return done.stdout


def drawn(storage: Path, *words: str) -> tuple[list[str], np.ndarray]:
    """Captions and images that `jobs.sample` wrote."""
    out = run("sample", storage, "sampling.num_samples=4", *words)
    folder = Path(out.rpartition(": ")[2].strip())
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    images = [np.asarray(Image.open(folder / f"images/{i:06d}.png")) for i in range(4)]
    assert (folder / "samples.png").is_file()
    return [row["text"] for row in rows], np.stack(images)


def share_of_own_captions(model: Model, held_out: Digits, how: dict[str, int]) -> float:
    """What `jobs.evaluate` measures, by the Python interface."""
    index = validation_rows(len(held_out.captions), how["rows"])
    captions, images = [held_out.captions[i] for i in index], held_out.images[index]
    tokenizer = model.tokenizer
    assert isinstance(tokenizer, PairTokenizer)
    candidates = draw_candidates(tokenizer.encode_captions(captions, 10)[0], how["seed"])
    bounds = [
        model.score_pairs([captions[i] for i in column], images, given="caption", draws=1, seed=how["seed"])
        for column in candidates.T
    ]
    return float((np.argmin(bounds, 0) == 0).mean())


def check_comparison(storage: Path, alone: Sequence[dict[str, Any]], *words: str) -> None:
    """Two models are compared by the figures that each has alone, and by speed."""
    ar = ("train.steps=2", "train.validate_every=2", "optim.warmup_steps=1", f"cluster.storage={storage}")
    done = run_job("pretrain", str(ROOT / "configs/pair/ar_quickstart.yaml"), *ar)
    assert done.code == 0, done.stderr[-6000:]
    models = {
        name: str(storage / f"pair_{run}/model")
        for name, run in (("P", "quickstart"), ("A", "ar_quickstart"))
    }
    config = load(
        ROOT / "configs/evaluate/pairs.yaml",
        [
            f"cluster.storage={storage}",
            f"evaluation.models={json.dumps(models)}",
            "evaluation.steps=[4]",
            *words,
        ],
    )
    found = compare(config)
    keys = [f"{group['key']}/P" for group in alone]
    assert [group.key for group in found.likelihoods] == [
        *keys,
        *(f"validation{part}/A" for part in ("", "_given_caption", "_captions")),
    ]
    for group, own in zip(found.likelihoods, alone, strict=False):
        assert [m.value for m in group.measures] == [figure["value"] for figure in own["figures"]]
    assert [(point.model, point.steps, point.measures) for point in found.points] == [
        ("P", 4, []),
        ("A", 26, []),
    ]
    pictures, text = check_page(Path(found.folder, "report.html").read_text())
    assert len(pictures) == 4  # held out, two models, convergence
    assert "A, 26 steps" in text


@pytest.mark.slow
def test_four_uses(tmp_path: Path, ray_cluster: None) -> None:
    short = ("evaluation.draws=1", "evaluation.rows=100", "model.dropout=0.1")
    words = (*short, "train.steps=500", "train.validate_every=500")
    out = job_output("pretrain", CONFIG, f"cluster.storage={tmp_path}", *words)
    assert str(tmp_path / "pair_quickstart/samples.png") in out
    model, (train, held_out) = load_model(tmp_path / "pair_quickstart/model"), split()
    images = images_of_captions(model, train, held_out)
    assert images["digit"] > 0.7
    assert min(images[name] for name in ("mass", "width", "slant")) > 0.25
    assert captions_of_images(model, held_out, filters=LIKELIEST)["a caption of the data's form"] > 0.5

    assert drawn(tmp_path, "sampling.prompt=a thick three")[0] == ["a thick three"] * 4
    real = held_out.images[0]
    Image.fromarray(real).save(tmp_path / "digit.png")
    Image.fromarray(np.repeat([0, 255], 4).astype(np.uint8)[None].repeat(8, 0)).save(tmp_path / "mask.png")
    (tmp_path / "gaps.txt").write_text("a[[1]] three\n")
    image = f"sampling.inpaint={tmp_path}/digit.png"
    captions, whole = drawn(tmp_path, image)
    assert (whole == whole[0]).all()
    assert len({*captions}) > 1
    halves = drawn(tmp_path, image, f"sampling.mask={tmp_path}/mask.png", "sampling.prompt=a three")[1]
    assert (halves[:, :, :4] == whole[0, :, :4]).all()
    captions, _ = drawn(tmp_path, f"sampling.infill={tmp_path}/gaps.txt", "sampling.view=true")
    assert all(text.startswith("a") and text.endswith(" three") for text in captions)
    assert len(drawn(tmp_path)[0]) == 4

    run("evaluate", tmp_path, *short, "evaluation.batch=64")  # the batch of score_pairs
    folder = tmp_path / "pair_quickstart/evaluation"
    groups = json.loads((folder / "evaluation.json").read_text())["groups"]
    validation = [
        "validation",
        *(f"validation_{part}" for part in ("given_caption", "given_image", "captions")),
    ]
    assert [group["key"] for group in groups] == [*validation, "samples"]
    assert groups[3]["figures"][0]["value"] == share_of_own_captions(model, held_out, groups[3]["how"]) > 0.4
    assert (folder / "samples.png").is_file()
    assert (folder / "held_out.png").is_file()
    check_comparison(tmp_path, groups[:4], *short[:2], "evaluation.batch=64")
