"""Images with captions: every source gives the same pairs, and rows are a caption and the codes of its image."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.config.data import PairDataConfig
from pipeline.config.load import parse
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import TOKENIZER, check_fits
from pipeline.data.prepare.captions import describe_digits, digit_of, digits, measures
from pipeline.data.prepare.image_sources import list_images, open_images
from pipeline.data.prepare.images import held_out, read_pixels
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import PairTokenizer, saved_tokenizer
from pipeline.errors import ConfigError, DataError
from tests.support.data_helpers import data_path, ensure
from tests.support.image_helpers import encoded, make_images, write_folders, write_tar

IMAGES, _ = make_images(12)
CAPTIONS = [f"picture {i}, größe ☃" for i in range(12)]
FILES = [encoded(image) for image in IMAGES]


def write_folder(folder: Path) -> str:
    lines = []
    for number, (file, caption) in enumerate(zip(FILES, CAPTIONS, strict=True)):
        path = folder / f"part{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
        lines.append(json.dumps({"caption": f" {caption}\n", "file": f"part{number % 2}/{number}.png"}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return str(folder)


def write_parquet(folder: Path) -> str:
    folder.mkdir()
    pq.write_table(pa.table({"image": FILES, "caption": CAPTIONS}), folder / "a.parquet", row_group_size=5)
    return str(folder)


def write_tars(folder: Path) -> str:
    """Captions as text in one file, in JSON in the other; a member of another kind, and one without an image."""
    pairs = [*zip(FILES, CAPTIONS, strict=True)]
    write_tar(folder / "0.tar", [{"png": file, "txt": f"{text}\n".encode()} for file, text in pairs[:5]])
    rest = [{"json": json.dumps({"caption": text}).encode(), "png": file} for file, text in pairs[5:]]
    write_tar(folder / "1.tar", [*rest, {"md": b"a note"}], 5)
    return str(folder)


def section(source: str, **keys: Any) -> PairDataConfig:
    return PairDataConfig(kind="pair", source=source, **keys)


def pairs_of(data: PairDataConfig) -> tuple[dict[str, bytes], list[str]]:
    """The pixels of every caption, and the problems."""
    listing = list_images(open_images(data), data)
    pixels = read_pixels(listing.refs, data)
    assert listing.class_names is None
    found = dict(zip(pixels.labels.tolist(), (image.tobytes() for image in pixels.images), strict=True))
    return found, [*map(str, listing.problems), *pixels.problems]


@pytest.mark.parametrize("write", [write_folder, write_parquet, write_tars])
def test_every_source_gives_the_same_pairs(write: Callable[[Path], str], tmp_path: Path) -> None:
    found, problems = pairs_of(section(write(tmp_path / "data")))
    whole = np.repeat(IMAGES[..., None], 3, -1)
    assert found == {caption: image.tobytes() for caption, image in zip(CAPTIONS, whole, strict=True)}
    assert not problems


def test_what_is_wrong_with_captions_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_folder(folder)
    bad = {
        '{"file": "part0/0.png"}': "no field 'caption' in the line; did you mean 'captoin'",
        '{"file": "part0/1.png", "caption": "x"}': "no image 'part0/1.png' in the folder; did you mean '",
        '{"file": "part0/2.png", "caption": "x"}': "a second caption of 'part0/2.png'",
        '{"file": "part0/4.png", "caption": " "}': "field 'caption' of the line holds an empty text",
        '{"file": 3, "caption": "x"}': "field 'file' of the line holds a int",
        "[1]": "the line holds a list; expected an object",
        "{": "no JSON: ",
    }
    good = '{"file": "part0/2.png", "caption": "two"}'
    lines = [good, *bad]
    lines[1] = '{"file": "part0/0.png", "captoin": "x"}'
    (folder / "captions.jsonl").write_text("\n".join(lines))
    data = section(str(folder), on_error="skip")
    found, problems = pairs_of(data)
    assert [*found] == ["two"]
    for number, (says, problem) in enumerate(zip(bad.values(), problems, strict=True), 2):
        assert f"captions.jsonl line {number}: " in problem
        assert says in problem
    (folder / "captions.jsonl").rename(folder / "caption.jsonl")
    with pytest.raises(DataError, match=r"data.captions: no file 'captions.jsonl' .* did you mean"):
        pairs_of(section(str(folder)))
    with pytest.raises(DataError, match=r"no column 'captions'.* did you mean 'caption'"):
        pairs_of(section(write_parquet(tmp_path / "parquet"), caption_field="captions"))
    write_tar(tmp_path / "0.tar", [{"png": FILES[0], "cls": b"1"}, {"png": FILES[0], "txt": b" "}])
    problems = pairs_of(section(str(tmp_path / "0.tar"), on_error="skip"))[1]
    assert "no caption among png, cls; expected txt, or json with the field 'caption'" in problems[0]
    assert "field 'caption' of txt holds an empty text" in problems[1]
    table = pa.table({"image": [FILES[0]] * 2, "caption": ["", None]})
    pq.write_table(table, tmp_path / "b.parquet")
    problems = pairs_of(section(str(tmp_path / "b.parquet"), on_error="skip"))[1]
    assert "'caption' (data.caption_field) holds an empty text; expected a caption" in problems[0]
    assert "holds a NoneType; expected a caption" in problems[1]


def test_folders_of_classes_have_no_captions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.captions: no file 'captions.jsonl'"):
        pairs_of(section(write_folders(tmp_path, IMAGES, np.zeros(12, np.int64))))


def test_descriptions_say_what_is_measured() -> None:
    """Every word stands for a third of the images of each digit: those with most, or least, of one measure."""
    pixels, labels = digits()
    captions = np.array(describe_digits(pixels, labels))
    assert [digit_of(caption) for caption in captions] == labels.tolist()
    found = measures(pixels)
    for name, most, least in (
        ("mass", "thick", "thin"),
        ("width", "wide", "narrow"),
        ("slant", "right", "left"),
    ):
        for digit in range(10):
            own, value = labels == digit, found[name]
            high, low = (own & (np.char.find(captions, f"{word}") >= 0) for word in (most, least))
            between = own & ~high & ~low
            assert value[low].max() <= value[between].min()
            assert value[between].max() <= value[high].min()
            assert 0.3 < high.sum() / own.sum() < 0.36
    # A stroke from the lower left to the upper right, and a wide one.
    stroke = np.eye(8, dtype=np.uint8)[None, :, ::-1] * 255
    assert measures(stroke)["slant"] == pytest.approx([1])
    assert measures(np.ascontiguousarray(stroke[:, :, ::-1]))["slant"] == pytest.approx([-1])
    assert measures(np.full((1, 4, 8), 255, np.uint8))["width"] > 1
    assert digit_of("a one or a two") is None


def make_config(storage: Path, **data: Any) -> RunConfig:
    data = {"kind": "pair", "codes": 32, "validation_images": 2, "caption_length": 20, **data}
    tree = {"name": "t", "data": data, "train": {"batch": 8}, "sampling": {"steps": 1}}
    return parse({**tree, "cluster": {"storage": str(storage)}}, "test")


@pytest.mark.parametrize("tokenizer", [pytest.param("bytes", marks=pytest.mark.slow), "bpe:300"])
def test_rows_are_captions_and_codes(ray_cluster: None, tmp_path: Path, tokenizer: str) -> None:
    config = make_config(tmp_path / "runs", source=write_folder(tmp_path / "data"), text_tokenizer=tokenizer)
    data, manifest = config.data, ensure(config)
    assert isinstance(data, PairDataConfig)
    pair = saved_tokenizer(Path(storage.fetch(f"{data_path(config)}/{TOKENIZER}")))
    assert isinstance(pair, PairTokenizer)
    text = pair.text.vocab_size
    assert manifest.facts.modalities == (20, text)
    assert (manifest.vocabulary, manifest.length, manifest.grid) == (text + 32, 36, 4)
    assert (manifest.special.bos, manifest.special.eot, manifest.tokenizer.hash) == (
        None,
        pair.text.eot,
        pair.hash,
    )
    pixels = read_pixels(list_images(open_images(data), data).refs, data)
    ids = [pair.text.encode(caption) for caption in pixels.labels.tolist()]
    assert manifest.rows_cut == sum(len(part) >= 20 for part in ids) == (12 if tokenizer == "bytes" else 0)
    expected = np.full((12, 36), pair.text.eot)
    for row, part in zip(expected, ids, strict=True):
        row[: min(20, len(part))] = part[:20]
    expected[:, 20:] = pair.image.encode(pixels.images) + text
    out = held_out(np.arange(12), 2, 12)
    for split, rows in (("train", expected[~out]), ("validation", expected[out])):
        reader = ShardReader(data_path(config), manifest, split)
        found = reader.read(np.arange(len(reader)))
        assert np.array_equal(found.tokens, rows)
        assert (found.labels, found.roles) == (None, None)
    assert pair.captions(expected, 20) == [pair.text.decode(part[:20]) for part in ids]
    assert np.array_equal(pair.images(expected, 20), pair.image.decode(pair.image.encode(pixels.images)))
    check_fits(manifest, config)
    other = data.model_copy(update={"caption_length": 30, "codes": 64, "text_tokenizer": "gpt2"})
    with pytest.raises(
        (DataError, ConfigError), match=r"data.caption_length: the data has 20, the config 30"
    ):
        check_fits(
            manifest, config.model_copy(update={"data": other.model_copy(update={"text_tokenizer": "bytes"})})
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"kind": "pgm", "classes": 10}}, "model.classes: 10, but data.kind pair has no labels"),
        ({"diffusion": {"schedule": "arccos"}}, "diffusion.schedule: arccos hides too much of captions"),
        ({"evaluation": {"scorer": "gpt2"}}, "evaluation.scorer: 'gpt2' with data.kind pair"),
        ({"train": {"batch": 8, "compile": True}}, "train.compile: true for rows with captions that may be given"),
        ({"data": {"kind": "pair", "text_tokenizer": "bpe:9"}}, "text_tokenizer 'bpe:9'; expected bpe:N with an N"),
        ({"data": {"kind": "pairs"}}, "pair"),
    ],
)  # fmt: skip
def test_conflicts(changes: dict[str, Any], says: str) -> None:
    tree = {"name": "t", "data": {"kind": "pair"}, "train": {"batch": 8}, "sampling": {"steps": 1}} | changes
    with pytest.raises(ConfigError, match=says):
        parse(tree, "test")
