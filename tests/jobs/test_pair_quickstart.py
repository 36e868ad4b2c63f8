"""The recipe of images with captions, shortened, and its four uses by command."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import load_model
from tests.support.digit_pairs import captions_of_images, images_of_captions, split
from tests.support.in_process import run_job
from tests.support.launched import ROOT, job_output

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
    assert captions_of_images(model, held_out)["a caption of the data's form"] > 0.5

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

    run("evaluate", tmp_path, *short)
    folder = tmp_path / "pair_quickstart/evaluation"
    keys = [group["key"] for group in json.loads((folder / "evaluation.json").read_text())["groups"]]
    assert keys == ["validation", "validation_given_caption", "validation_given_image", "samples"]
    assert (folder / "samples.png").is_file()
    assert (folder / "held_out.png").is_file()
