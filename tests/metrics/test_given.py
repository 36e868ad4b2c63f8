"""Samples around what is given: prompts, blanks, masked images, and classes by name."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.api import Model, load_model
from pipeline.config.evaluation import SamplingConfig
from pipeline.config.model import ARConfig, PGMConfig
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.errors import CapabilityError, ConfigError, DataError
from pipeline.metrics.given import filled, given_by, painted, prompted, refuse
from pipeline.models import model_folder
from pipeline.models.vq import PatchVQ
from pipeline.run import Run
from pipeline.training.launch import sample
from tests.support.small_models import MDLM, PGM, randomised

L, BYTES = 16, ByteTokenizer()
AR = ARConfig(kind="ar", hidden=16, heads=2, blocks=1, dropout=0)
KINDS = {"pgm": PGM, "mdlm": MDLM, "ar": AR}
GRID, FACTOR, NAMES = 4, 2, ("ankle boot", "sandal", "sneaker")
IMAGES = PGMConfig(hidden=16, heads=2, encoder_blocks=1, decoder_blocks=1, dropout=0, classes=3)
PATCHES = np.random.default_rng(0).integers(0, 256, (12, FACTOR, FACTOR, 3)).astype(np.uint8)


def text_folder(folder: Path, kind: str, bos: int | None = None) -> Path:
    config = KINDS[kind]
    tensors = randomised(config, 257, L).state_dict()
    facts = model_folder.DataFacts(257, L, bos, 256)
    model_folder.write(folder, config, facts, tensors, model_folder.Background())
    BYTES.save(folder)
    return folder


def image_folder(folder: Path) -> Path:
    """12 codes on 4 x 4 grids behind a BOS (code 0), three named classes."""
    tensors = randomised(IMAGES, 12, GRID**2 + 1).state_dict()
    facts = model_folder.DataFacts(12, GRID**2 + 1, 0, None, class_names=NAMES)
    model_folder.write(folder, IMAGES, facts, tensors, model_folder.Background())
    PatchVQ(PATCHES).save(folder)
    return folder


def png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def picture_and_mask(height: int = 8, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Noise, and a mask of one pixel inside the square at row 1, column 2."""
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), bool)
    mask[3, 4] = True
    return pixels, mask


@pytest.mark.parametrize("bos", [None, 256])
def test_pieces_and_blanks(bos: int | None) -> None:
    start = int(bos is not None)
    given = filled("ab[[3]]é[[ 2 ]]", BYTES, L, bos, prefix_only=False)
    places = {start + i: byte for i, byte in zip((0, 1, 5, 6), "abé".encode(), strict=True)}
    assert (given.known, given.end, given.unknown) == (places, start + 9, L - start - 4)
    assert filled("[[word]] ____ [[4]]", BYTES, 32, None, prefix_only=True).end == 14 + 4
    prompt = prompted("abc", BYTES, L, bos)
    assert (prompt.known, prompt.unknown) == ({start + i: 97 + i for i in range(3)}, L - start - 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no blanks ____", "template: no blank; expected blanks such as [[12]]"),
        ("a [[x]] b", "no blank"),
        ("a[[0]]b", "a blank of no tokens"),
        ("0123456789[[7]]", "17 tokens with blanks; expected at most 16 for rows of 16"),
        ("half \ud800 [[2]]", "half of a surrogate pair"),
    ],
)
def test_texts_without_blanks_and_long_ones(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        filled(text, BYTES, L, None, prefix_only=False)
    assert says in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_object_fills_in(tmp_path: Path, kind: str) -> None:
    model = load_model(text_folder(tmp_path / kind, kind))
    texts = model.infill("ab[[4]]", num_samples=2, seed=1)
    assert [text[:2] for text in texts] == ["ab", "ab"]
    assert texts[0] != texts[1]
    known = {0: 97, 1: 98}
    assert texts == model.decode(model.sample(2, seed=1, known=known)[:, :6])
    if kind == "ar":
        with pytest.raises(CapabilityError, match=r"text behind a blank.*expected one blank at the end"):
            model.infill("ab[[4]]cd")
    else:
        rows = model.sample(2, seed=1, known=known | {6: 99, 7: 100})
        assert model.infill("ab[[4]]cd", num_samples=2, seed=1) == model.decode(rows[:, :8])


def test_masked_squares_alone_are_drawn_again(tmp_path: Path) -> None:
    model = load_model(image_folder(tmp_path / "model"))
    pixels, mask = picture_and_mask()
    assert isinstance(model.tokenizer, PatchVQ)
    codes = model.tokenizer.encode(pixels[None])[0]
    given = painted(pixels, mask, model.tokenizer, GRID**2 + 1, 0)
    hidden = 1 * GRID + 2
    assert given.known == {1 + i: code for i, code in enumerate(codes) if i != hidden}
    assert given.unknown == 1
    assert given.picture is not None
    assert (given.picture[2:4, 4:6] == 128).all()
    changed = given.picture != pixels
    changed[2:4, 4:6] = False
    assert not changed.any()
    drawn = model.inpaint(pixels, mask, num_samples=8, condition=[1] * 8, seed=2)
    kept = model.tokenizer.decode(codes[None])[0]
    outside = np.ones((8, 8), bool)
    outside[2:4, 4:6] = False
    assert all(np.array_equal(image[outside], kept[outside]) for image in drawn)
    assert len({image.tobytes() for image in drawn}) > 1
    (tmp_path / "a.png").write_bytes(png(pixels))
    (tmp_path / "m.png").write_bytes(png(mask.astype(np.uint8) * 255))
    files = model.inpaint(
        tmp_path / "a.png", str(tmp_path / "m.png"), num_samples=8, condition=[1] * 8, seed=2
    )
    assert np.array_equal(files, drawn)


def test_a_larger_picture_is_cropped_with_its_mask() -> None:
    """16 x 20 pixels: squares of 4 x 4 behind a margin of 2 columns."""
    pixels, mask = picture_and_mask(16, 20)
    mask[:] = False
    mask[7, 9] = True  # column 7 of the centre
    given = painted(png(pixels), png(mask.astype(np.uint8) * 255), PatchVQ(PATCHES), GRID**2, None)
    assert set(range(GRID**2)) - set(given.known) == {1 * GRID + 1}
    mask[7, 9], mask[0, 0] = False, True
    with pytest.raises(ConfigError, match="white outside the centre square alone"):
        painted(pixels, mask, PatchVQ(PATCHES), GRID**2, None)


@pytest.mark.parametrize(
    ("image", "mask", "kind", "says"),
    [
        (
            picture_and_mask()[0],
            np.zeros((8, 9), bool),
            ConfigError,
            "mask: 9 x 8 pixels; expected the image's 8 x 8",
        ),
        (picture_and_mask()[0], np.zeros((8, 8), bool), ConfigError, "mask: no white pixel"),
        (picture_and_mask()[0], b"GIF89a", DataError, "mask: no image that can be read"),
        (b"not an image", np.ones((8, 8), bool), DataError, "cannot identify image"),
    ],
)
def test_pictures_that_do_not_fit(image: Any, mask: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        painted(image, mask, PatchVQ(PATCHES), GRID**2, None)


def test_classes_by_name(tmp_path: Path) -> None:
    model = load_model(image_folder(tmp_path / "model"))
    assert model.class_names == NAMES
    named, numbered = (model.sample(2, seed=3, condition=labels) for labels in (["sneaker", 0], [2, 0]))
    assert (named == numbered).all()
    with pytest.raises(
        ConfigError, match=r"'sneeker': no such class; did you mean 'sneaker'\?; known: ankle"
    ):
        model.sample(1, condition=["sneeker"])
    with pytest.raises(ConfigError, match="classes have no names; expected numbers"):
        Model(model.denoiser, model.bos).sample(1, condition=["sneaker"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompt": "x" * 16}, "sampling.prompt: 16 tokens; expected at most 15"),
        ({"infill": "FOLDER/tmplate.txt"}, "no such file; did you mean 'template.txt'"),
        ({"infill": "FOLDER"}, "is a folder; expected a file"),
        ({"infill": "FOLDER/latin.txt"}, "is not UTF-8: .* at byte 3"),
        ({"infill": "FOLDER/plain.txt"}, "sampling.infill: '.*plain.txt': no blank"),
        ({"inpaint": "FOLDER/plain.txt", "mask": "FOLDER/plain.txt"}, "has no tokenizer of images"),
    ],
)
def test_wrong_settings_are_refused_without_the_weights(
    tmp_path: Path, settings: dict[str, str], says: str
) -> None:
    (tmp_path / "template.txt").write_text("a[[2]]\n")
    (tmp_path / "plain.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    folder = text_folder(tmp_path / "model", "pgm")
    (folder / model_folder.WEIGHTS).write_bytes(b"not read")
    filled_in = {key: value.replace("FOLDER", str(tmp_path)) for key, value in settings.items()}
    with pytest.raises((ConfigError, DataError, CapabilityError), match=says):
        given_by(SamplingConfig(**filled_in), folder)  # type: ignore[arg-type]
    given = given_by(SamplingConfig(infill=str(tmp_path / "template.txt")), folder)
    assert given is not None
    assert (given.text, given.end) == ("a[[2]]", 3)


def test_keys_that_exclude_each_other() -> None:
    tree = {"name": "x", "sampling": {"prompt": "a", "infill": "b", "mask": "c"}}
    conflicts = RunConfig.model_validate(tree).conflicts()
    assert "sampling.prompt: together with sampling.infill; expected one of them" in conflicts
    assert any(
        line.startswith("sampling.mask: expected together with sampling.inpaint") for line in conflicts
    )
    with pytest.raises(
        ConfigError, match=r"sampling\.prompt: 'a' is for jobs\.sample; training expects null"
    ):
        refuse(SamplingConfig(prompt="a"), "training")
    with pytest.raises(
        ConfigError, match=r"sampling\.view: true is for jobs\.sample; training expects false"
    ):
        refuse(SamplingConfig(view=True), "training")


def run_config(storage: Path, name: str, **sampling: Any) -> RunConfig:
    settings = {"num_samples": 3, "batch": 3, "seed": 5, **sampling}
    tree = {"name": name, "cluster": {"storage": str(storage)}, "sampling": settings}
    return RunConfig.model_validate(tree)


def test_the_job(tmp_path: Path, ray_cluster: None) -> None:
    """Text and images; steps are no more than there are positions, and folders of what is given differ."""
    text = text_folder(tmp_path / "text", "ar")
    config = run_config(tmp_path, "a", model=str(text), prompt="ab", order="left_to_right", steps=L)
    samples = sample(config)
    rows = load_model(text).sample(3, seed=5, known={0: 97, 1: 98})
    assert samples.texts == [BYTES.decode(row) for row in rows.tolist()]
    first = (Path(samples.folder) / "samples.txt").read_text()
    assert first.startswith("--- given\nab\n\n--- sample 0\nab")
    assert '"given": "ab"' in (Path(samples.folder) / "samples.jsonl").read_text()
    (tmp_path / "t.txt").write_text("ab[[3]]c\n")
    pgm = text_folder(tmp_path / "pgm", "pgm")
    filled_in = sample(run_config(tmp_path, "a", model=str(pgm), infill=str(tmp_path / "t.txt")))
    assert filled_in.texts == load_model(pgm).infill("ab[[3]]c", num_samples=3, seed=5, steps=13)
    assert Path(filled_in.folder).parent == Path(samples.folder).parent != Path(filled_in.folder)
    images = image_folder(tmp_path / "images")
    pixels, mask = picture_and_mask()
    (tmp_path / "a.png").write_bytes(png(pixels))
    (tmp_path / "m.png").write_bytes(png(mask.astype(np.uint8) * 255))
    paths = {"inpaint": str(tmp_path / "a.png"), "mask": str(tmp_path / "m.png")}
    config = run_config(tmp_path, "b", model=str(images), labels=["sneaker", 0], steps=4, **paths)
    drawn = sample(config)
    assert drawn.labels == [2, 0, 2]
    expected = load_model(images).inpaint(pixels, mask, 3, condition=[2, 0, 2], seed=5, steps=1)
    for index, image in enumerate(expected):
        written = Image.open(Path(drawn.folder) / "images" / f"{index:06d}.png")
        assert np.array_equal(np.asarray(written), image)
    assert (Path(drawn.folder) / "given.png").is_file()
    wrong = config.model_copy(update={"sampling": config.sampling.model_copy(update={"labels": ("boot",)})})
    with pytest.raises(
        ConfigError, match=r"sampling\.labels: 'boot': no such class; did you mean 'ankle boot'"
    ):
        sample(wrong)
    assert Run.of(config).sampled_model() == str(images)
