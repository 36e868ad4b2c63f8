"""What is given of a caption and its image, by keys of jobs.sample and in Python: it is kept, the rest is drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import Model, load_model
from pipeline.config.evaluation import SamplingConfig
from pipeline.config.load import parse
from pipeline.data.tokenizers import ByteTokenizer, PairTokenizer
from pipeline.errors import CapabilityError, ConfigError, DataError
from pipeline.metrics.given import given_by
from pipeline.metrics.likelihood import pair_nats
from pipeline.models import build, model_folder
from pipeline.models.model_folder import DataFacts
from pipeline.models.vq import fit_patches
from tests.support.image_helpers import encoded, make_images
from tests.support.small_models import AR, CAUSAL, MDLM, PGM, shake

T, GRID = 8, 16
FACTS = DataFacts(257 + 12, T + GRID, None, 256, caption=T, text_ids=257)
KINDS = {"pgm": PGM, "causal": CAUSAL, "mdlm": MDLM, "ar": AR}
PIXELS = np.repeat(make_images(20)[0][..., None], 3, -1)
RIGHT = np.arange(8) >= np.full((8, 1), 4)
PAIR = PairTokenizer(ByteTokenizer(), fit_patches(PIXELS, 12, 2, seed=0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, config in KINDS.items():
        torch.manual_seed(0)
        weights = shake(build(config, FACTS.vocab_size, FACTS.length, None, FACTS.modalities)).state_dict()
        model_folder.write(root / name, config, FACTS, weights, model_folder.Background())
        PAIR.save(root / name)
    return {name: root / name for name in KINDS}


def codes_of(images: np.ndarray) -> np.ndarray:
    return PAIR.image.encode(images)


def cells() -> np.ndarray:
    """[16], True = in the right half of the image."""
    return (np.arange(GRID) % 4) >= 2


@pytest.mark.parametrize("name", ["pgm", "causal", "mdlm"])
def test_all_uses(name: str, folders: dict[str, Path]) -> None:
    model = load_model(folders[name])
    rows = model.sample(
        3,
        known=[
            {**dict(enumerate(ids)), **dict.fromkeys(range(len(ids), T), 256)}
            for ids in (b"one", b"a", b"seven")
        ],
    )
    assert np.array_equal(model.draw(["one", "a", "seven"]), model.pairs(rows)[1])
    assert model.pairs(rows)[0] == ["one", "a", "seven"]
    places = torch.arange(T + GRID).expand(4, -1)
    given = torch.from_numpy(np.pad(codes_of(PIXELS[:4]) + 257, ((0, 0), (T, 0))))
    captioned = model.sample(4, known=(given, places >= T), seed=2)
    assert model.caption(PIXELS[:4], seed=2) == model.pairs(captioned)[0]
    assert torch.equal(captioned[:, T:], given[:, T:])
    captions, images = model.sample_pairs(5, seed=1)
    assert (len(captions), images.shape) == (5, (5, 8, 8, 3))
    assert len({*captions}) == 5  # of a random model
    # Gaps of the caption, beside an image that is whole; and of the image, beside a whole caption.
    captions, images = model.complete("a[[2]]b", PIXELS[0], num_samples=3)
    assert all(codes == codes_of(PIXELS[:1]).tolist()[0] for codes in codes_of(images).tolist())
    assert len({*captions}) == 3
    drawn, images = model.complete("abc", PIXELS[0], RIGHT, num_samples=3)
    assert drawn == ["abc"] * 3
    old, new = codes_of(PIXELS[:1])[0], codes_of(images)
    assert (new[:, ~cells()] == old[~cells()]).all()
    assert (new[:, cells()] != old[cells()]).any()
    captions, images = model.complete("a[[1]]", PIXELS[0], RIGHT)
    assert captions[0][:1] == "a"
    assert (codes_of(images)[:, ~cells()] == old[~cells()]).all()


def test_the_best_of_several_captions(folders: dict[str, Path]) -> None:
    """Of the captions that are drawn of an image, the one with which the image has the smallest bound."""
    model = load_model(folders["pgm"])
    given = torch.from_numpy(np.pad(codes_of(PIXELS[:4]) + 257, ((0, 0), (T, 0)))).repeat(3, 1)
    drawn = model.sample(12, known=(given, torch.arange(T + GRID).expand(12, -1) >= T), seed=2)
    rows = drawn.view(3, 4, T + GRID)
    bounds = torch.stack([
        pair_nats(model.denoiser, part.numpy(), "caption", draws=16, seed=0) for part in rows
    ])  # fmt: skip
    best = bounds.argmin(0)
    assert len({*best.tolist()}) > 1
    expected = model.pairs(torch.stack([rows[k, i] for i, k in enumerate(best.tolist())]))[0]
    assert model.caption(PIXELS[:4], best_of=3, seed=2) == expected
    with pytest.raises(ConfigError, match="best_of: 0; expected"):
        model.caption(PIXELS[:4], best_of=0)


@pytest.mark.parametrize("name", ["pgm", "ar"])
def test_scores_are_the_bounds_of_rows(name: str, folders: dict[str, Path]) -> None:
    model = load_model(folders[name])
    captions = ["one", "two"]
    rows = np.concatenate([PAIR.encode_captions(captions, T)[0], PAIR.encode_images(PIXELS[:2])], 1)
    for part in ("nothing", "caption", "image"):
        if name == "ar" and part == "image":
            with pytest.raises(CapabilityError, match="given: 'image', but an autoregressive model reads"):
                model.score_pairs(captions, PIXELS[:2], part)
            continue
        expected = pair_nats(model.denoiser, rows, part, draws=3, seed=1)  # type: ignore[arg-type]
        assert model.score_pairs(captions, PIXELS[:2], part, draws=3, seed=1) == expected.tolist()  # type: ignore[arg-type]


def test_an_autoregressive_model_draws_images_and_pairs(folders: dict[str, Path]) -> None:
    model = load_model(folders["ar"])
    assert model.draw(["one"]).shape == (1, 8, 8, 3)
    assert len(model.sample_pairs(2)[0]) == 2
    for call in (lambda: model.caption(PIXELS[:1]), lambda: model.complete("a[[1]]")):
        with pytest.raises(CapabilityError, match="an autoregressive model draws behind a whole caption"):
            call()


def test_what_cannot_be_given(folders: dict[str, Path]) -> None:
    model = load_model(folders["pgm"])
    with pytest.raises(ConfigError, match=r"captions\[1\]: 8 tokens; expected at most 7 for rows of 8"):
        model.draw(["a", "abcdefgh"])
    with pytest.raises(ConfigError, match="so that nothing is left to draw"):
        model.complete("abc", PIXELS[0])
    with pytest.raises(ConfigError, match="mask: without image"):
        model.complete("abc", mask=RIGHT)
    with pytest.raises(ConfigError, match="captions: 1 for 2 images"):
        model.score_pairs(["a"], PIXELS[:2])
    with pytest.raises(ConfigError, match="num_samples"):
        model.draw([])
    with pytest.raises(ConfigError, match="tokens"):
        model.pairs(torch.zeros(1, T + GRID, dtype=torch.int64))
    plain = Model(build(PGM, 11, 12), None, ByteTokenizer())
    with pytest.raises(CapabilityError, match=r"not one of images with captions \(data.kind: pair\)"):
        plain.sample_pairs()


def test_the_page_of_steps_shows_images_under_their_captions(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "view.html"
    load_model(folders["pgm"]).sample(2, view=page)
    assert page.read_text().replace(": [", ":[").count('"codes":[') == 2


def test_keys_of_the_job(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(PIXELS[0]))
    Image.fromarray(RIGHT.astype(np.uint8) * 255).save(tmp_path / "m.png")
    (tmp_path / "t.txt").write_text("a[[2]]\n")
    image = {"inpaint": str(tmp_path / "a.png")}
    masked = image | {"mask": str(tmp_path / "m.png")}
    known = {T + place: 257 + code for place, code in enumerate(codes_of(PIXELS[:1])[0].tolist())}
    kept = {place: token for place, token in known.items() if not cells()[place - T]}
    caption = dict(enumerate(b"ab")) | dict.fromkeys(range(2, T), 256)
    gaps = {0: 97} | dict.fromkeys(range(3, T), 256)
    cases: list[tuple[dict[str, str], dict[int, int]]] = [
        ({"prompt": "ab"}, caption),
        (image, known),
        ({"infill": str(tmp_path / "t.txt")}, gaps),
        ({"prompt": "ab"} | masked, caption | kept),
        ({"infill": str(tmp_path / "t.txt")} | image, gaps | known),
        (masked, kept),
    ]
    for settings, expected in cases:
        given = given_by(SamplingConfig(**settings), folders["pgm"])  # type: ignore[arg-type]
        assert given is not None
        assert given.known == expected
        assert given.unknown == T + GRID - len(expected)
        tree = {
            "name": "t",
            "data": {"kind": "pair", "validation_images": 9},
            "sampling": {"steps": 1, **settings},
        }
        parse({**tree, "train": {"batch": 8}}, "test")  # no conflicts
    with pytest.raises(CapabilityError, match=r"sampling\.inpaint: an autoregressive model draws behind"):
        given_by(SamplingConfig(**image), folders["ar"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"sampling\.inpaint: "):
        given_by(SamplingConfig(inpaint=str(tmp_path / "t.txt")), folders["pgm"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"inpaint": "a.png"}, "sampling.inpaint: without sampling.mask, which only a model of captions"),
        ({"prompt": "a", "inpaint": "a.png"}, "sampling.prompt: together with sampling.inpaint, which only"),
    ],
)
def test_other_models_take_one_key(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    facts = DataFacts(257, 12, None, 256)
    model_folder.write(tmp_path, PGM, facts, build(PGM, 257, 12).state_dict(), model_folder.Background())
    with pytest.raises(ConfigError, match=says):
        given_by(SamplingConfig(**settings), tmp_path)
