"""Sources of images: the same pixels and labels from every kind of file, and a name for all that is wrong."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from pipeline import storage
from pipeline.config.data import ImageDataConfig
from pipeline.data.prepare.image_sources import Listing, list_images, open_images
from pipeline.data.prepare.images import Pixels, read_pixels
from pipeline.data.reading_order import permutation
from pipeline.errors import DataError
from tests.support.image_helpers import (
    CLASSES,
    encoded,
    idx,
    make_images,
    write_folders,
    write_idx,
    write_parquet,
    write_tar,
    write_tars,
)

IMAGES, LABELS = make_images(23)


def make_data(source: str, classes: int = CLASSES, **data: object) -> ImageDataConfig:
    return ImageDataConfig(kind="image", source=source, classes=classes, **data)  # type: ignore[arg-type]


def listed(data: ImageDataConfig) -> Listing:
    return list_images(open_images(data), data)


def everything(data: ImageDataConfig) -> Pixels:
    """All images, read a few at a time as units do."""
    refs = listed(data).refs
    parts = [read_pixels(refs[i : i + 6], data) for i in range(0, len(refs), 6)]
    return Pixels(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([6 * i + part.kept for i, part in enumerate(parts)]),
        list(itertools.chain(*(part.problems for part in parts))),
    )


@pytest.mark.parametrize(
    "kind", ["folders", "idx", "tar", "parquet", "hub parquet", "hub tar", "glob", "url"]
)
def test_every_kind_gives_the_same_images(kind: str, tmp_path: Path) -> None:
    """Folders and idx files are listed in a fixed random order, the others as they come."""
    by_class = np.argsort(LABELS, kind="stable")
    order = permutation(23, 1)
    if kind == "folders":
        source, order = write_folders(tmp_path / "x", IMAGES, LABELS), by_class[order]
    elif kind == "idx":
        source = write_idx(tmp_path / "x", IMAGES, LABELS)
        write_idx(tmp_path / "x", IMAGES[::-1], LABELS[::-1], "t10k")  # not read beside the training files
    elif kind == "url":
        write_folders(tmp_path / "x", IMAGES, LABELS)
        source, order = "memory://images-by-url", by_class[order]
        storage.publish_folder(tmp_path / "x", source)
    else:
        order = np.arange(23)
        write = write_tars if "tar" in kind or kind == "glob" else write_parquet
        source = write(tmp_path / "x", IMAGES, LABELS)
        source = f"hf:{source}" if "hub" in kind else f"{source}/*-000?.tar" if kind == "glob" else source
    pixels = everything(make_data(source))
    assert np.array_equal(pixels.images, IMAGES[order][..., None].repeat(3, 3))
    assert np.array_equal(pixels.labels, LABELS[order])
    assert np.array_equal(pixels.kept, np.arange(23))


def test_digits() -> None:
    pixels = everything(make_data("digits", 10))
    order = permutation(1797, 1)
    assert np.array_equal(pixels.labels, load_digits().target[order])
    expected = np.rint(load_digits().images * 255 / 16)[order]
    assert np.array_equal(pixels.images, expected[..., None].repeat(3, 3))
    assert np.abs(np.diff(pixels.labels)).mean() > 2  # mixed, not sorted


def test_only_the_asked_images_are_read(tmp_path: Path) -> None:
    for write in (write_parquet, write_tars, write_idx, write_folders):
        data = make_data(write(tmp_path / write.__name__, IMAGES, LABELS))
        refs, whole = listed(data).refs, everything(data)
        some = [2, 3, 11, 12, 22]
        assert np.array_equal(read_pixels([refs[i] for i in some], data).images, whole.images[some])


def test_classes_are_the_sorted_folders(tmp_path: Path) -> None:
    write_folders(tmp_path, IMAGES, LABELS)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "class_1" / "._00001.png").write_bytes(b"what some systems leave beside a file")
    (tmp_path / "class_2" / "more").mkdir()
    (tmp_path / "class_2" / "more" / "photo.JPEG").write_bytes(encoded(IMAGES[0], "JPEG"))
    listing = listed(make_data(str(tmp_path)))
    assert listing.class_names == ("class_0", "class_1", "class_2")
    assert len(listing.refs) == 24
    assert {(Path(ref.path).relative_to(tmp_path).parts[0], ref.label) for ref in listing.refs} == {
        (f"class_{i}", i) for i in range(3)
    }
    two = listed(make_data(f"{tmp_path}/class_[02]/*.png", 2))  # a glob says which classes there are
    assert two.class_names == ("class_0", "class_2")
    assert two.problems == []


def test_empty_class_folder_and_other_numbers_of_classes(tmp_path: Path) -> None:
    source = write_folders(tmp_path, IMAGES, LABELS)
    with pytest.raises(
        DataError, match=r"data.classes: 5, but .* has folders of 3 classes; .*data.classes=3"
    ):
        listed(make_data(source, 5))
    (tmp_path / "class_15").mkdir()  # between 1 and 2
    listing = listed(make_data(source, 4))
    assert [str(problem) for problem in listing.problems] == [
        f"{tmp_path}/class_15: no image in this class; expected .jpg, .jpeg, .png, .webp, .bmp"
    ]
    assert {ref.label for ref in listing.refs} == {0, 1, 3}
    (tmp_path / "class_15").rmdir()
    with pytest.raises(
        DataError, match=r"data.classes: 2, but .* 3 classes; .*or a glob .* class_0, class_1, class_2"
    ):
        listed(make_data(source, 2, on_error="skip"))


@pytest.mark.parametrize(
    "extra", ["__MACOSX/class_0/._00000.png", "__MACOSX/x.png", "a/.DS_Store", "a/notes.txt", "a"]
)
def test_a_folder_beside_the_classes_moves_no_label(extra: str, tmp_path: Path) -> None:
    source = write_folders(tmp_path, IMAGES, LABELS)
    before = listed(make_data(source))
    path = tmp_path / extra
    path.mkdir(parents=True)
    if path.suffix or path.name.startswith("."):
        path.rmdir()
        path.write_bytes(b"what some systems leave beside a file")
    after = listed(make_data(source))
    assert (after.refs, after.problems, after.class_names) == (
        before.refs,
        [],
        ("class_0", "class_1", "class_2"),
    )


def test_a_folder_of_images_beside_the_classes_is_refused(tmp_path: Path) -> None:
    source = write_folders(tmp_path, IMAGES, LABELS)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(encoded(IMAGES[0]))
    for on_error in ("fatal", "skip"):
        with pytest.raises(
            DataError, match=r"data.classes: 3, but .* folders of 4 classes; .*data.classes=4, or a glob"
        ):
            listed(make_data(source, on_error=on_error))


def test_linked_classes(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "images", IMAGES, LABELS)
    before = listed(make_data(source))
    (tmp_path / "images" / "class_1").rename(tmp_path / "elsewhere")
    (tmp_path / "images" / "class_1").symlink_to(tmp_path / "elsewhere")
    assert listed(make_data(source)).refs == before.refs


def test_labels_outside_the_classes(tmp_path: Path) -> None:
    sources = [write(tmp_path / write.__name__, IMAGES, LABELS) for write in (write_idx, write_tars)]
    for source in sources:
        listing = listed(make_data(source, 2))
        assert len(listing.problems) == (LABELS == 2).sum()
        assert all("label 2; expected 0 to 1 (data.classes)" in str(problem) for problem in listing.problems)
    data = make_data(write_parquet(tmp_path / "parquet", IMAGES, LABELS), 2, on_error="skip")
    pixels = everything(data)
    assert np.array_equal(pixels.kept, np.flatnonzero(LABELS < 2))
    assert pixels.problems[0].endswith(
        "00000-of-00002.parquet row 2: label 2; expected 0 to 1 (data.classes)"
    )
    with pytest.raises(DataError, match=r"row 2: label 2; expected 0 to 1 .*\(data.on_error: skip counts"):
        everything(make_data(data.source, 2))


def test_spoilt_samples_of_tars(tmp_path: Path) -> None:
    good = encoded(IMAGES[0])
    samples = [
        {"png": good, "cls": b"1\n"},
        {"cls": b"1"},
        {"png": good},
        {"png": good, "cls": b"cat"},
        {"png": good, "json": b'{"class": 1}'},
        {"png": good, "json": b"{"},
        {"png": good, "cls": b"-1"},
        {"seg.png": good, "png": good[: len(good) // 2], "cls": b"0"},
        {"jpg": encoded(IMAGES[1], "JPEG"), "json": b'{"label": 2}'},
    ]
    write_tar(tmp_path / "a.tar", samples)
    data = make_data(str(tmp_path / "a.tar"), on_error="skip")
    told = [str(problem).removeprefix(f"{tmp_path}/a.tar: ") for problem in listed(data).problems]
    assert told[:3] == [
        "s/00001: no image among cls; expected jpg, jpeg, png, webp, bmp",
        "s/00002: no label among png; expected cls, or json with the field 'label' (data.label_field)",
        "s/00003: no label in cls: invalid literal for int() with base 10: 'cat'",
    ]
    assert told[3].startswith("s/00004: no label among png, json; expected cls")
    assert told[4].startswith("s/00005: no label in json: Expecting property name")
    assert told[5] == "s/00006: label -1; expected 0 to 2 (data.classes)"
    assert len(told) == 6
    pixels = everything(data)
    assert pixels.labels.tolist() == [1, 2]
    (problem,) = pixels.problems
    assert problem.startswith(f"{tmp_path}/a.tar: s/00007.png: OSError: ")
    renamed = make_data(str(tmp_path / "a.tar"), label_field="class")
    assert {ref.name: ref.label for ref in listed(renamed).refs}["s/00004.png"] == 1


def test_tars_that_end_too_early(tmp_path: Path) -> None:
    write_tars(tmp_path, IMAGES, LABELS)
    first = tmp_path / "shard-train-0000.tar"
    first.write_bytes(first.read_bytes()[:5000])
    listing = listed(make_data(str(tmp_path)))
    (problem,) = listing.problems
    assert str(problem).startswith(f"{first}: cannot be read to the end: ReadError: unexpected end of data")
    assert 12 < len(listing.refs) < 23
    assert np.array_equal(everything(make_data(str(tmp_path))).labels[-12:], LABELS[11:])
    first.write_bytes(b"")
    assert "ReadError: empty file" in str(listed(make_data(str(tmp_path))).problems[0])


def test_spoilt_parquet(tmp_path: Path) -> None:
    table = {"image": [encoded(IMAGES[0]), b"x", None], "label": [0, 1, 2], "id": [7, 8, 9]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    pixels = everything(make_data(source, on_error="skip"))
    assert pixels.labels.tolist() == [0]
    assert "a.parquet row 1: UnidentifiedImageError" in pixels.problems[0]
    assert "a.parquet row 2: 'image' (data.image_field) holds a NoneType" in pixels.problems[1]
    with pytest.raises(DataError, match=r"data.image_field: no column 'imgae' in .*; did you mean 'image'\?"):
        listed(make_data(source, image_field="imgae"))
    with pytest.raises(
        DataError, match=r"data.label_field: no column 'cls' in .*; columns: image, label, id"
    ):
        listed(make_data(source, label_field="cls"))
    (tmp_path / "a.parquet").write_bytes(b"thesis")
    assert "a.parquet: cannot be read: ArrowInvalid" in str(listed(make_data(source)).problems[0])


def test_a_bad_row_of_parquet_costs_only_itself(tmp_path: Path) -> None:
    files = [encoded(image) for image in IMAGES[:12]]
    table = pa.table({"image": files, "label": LABELS[:12]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, compression="none", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = content.index(files[4])
    content[start - 30 : start] = bytes(30)  # the header of the page
    (tmp_path / "a.parquet").write_bytes(content)
    pixels = everything(make_data(str(tmp_path / "a.parquet"), on_error="skip"))
    assert pixels.kept.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert [problem.partition(": ")[0] for problem in pixels.problems] == [
        f"{tmp_path}/a.parquet row {row}" for row in range(4, 8)
    ]


def test_a_cell_of_parquet_that_is_no_text(tmp_path: Path) -> None:
    labels = pa.array([b"\xff", b"1"]).view(pa.utf8())
    pq.write_table(pa.table({"image": [encoded(IMAGES[0])] * 2, "label": labels}), tmp_path / "a.parquet")
    first, second = everything(make_data(str(tmp_path / "a.parquet"), on_error="skip")).problems
    assert first.startswith(f"{tmp_path}/a.parquet row 0: cannot be read: UnicodeDecodeError")
    assert second == f"{tmp_path}/a.parquet row 1: label '1'; expected 0 to 2 (data.classes)"


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    for write in (write_idx, write_tars, write_parquet, write_folders):
        source = Path(write(tmp_path / write.__name__, IMAGES, LABELS))
        before = everything(make_data(str(source)))
        for file in list(source.rglob("*.*" if write is not write_idx else "*")):
            file.rename(file.with_name(file.name.upper()))
        after = everything(make_data(str(source)))
        assert np.array_equal(after.images, before.images)
        assert np.array_equal(after.labels, before.labels)


def test_a_decoder_with_errors_of_its_own(tmp_path: Path) -> None:
    """An AVIF image whose decoder raises RuntimeError, as .jpg, beside good ones."""
    source = write_folders(tmp_path, IMAGES, LABELS)
    damaged = Path(__file__).parents[1] / "damaged_avif.jpg"
    (tmp_path / "class_1" / "photo.jpg").write_bytes(damaged.read_bytes())
    pixels = everything(make_data(source, on_error="skip"))
    (problem,) = pixels.problems
    assert len(pixels.images) == 23
    assert problem.startswith(f"{tmp_path}/class_1/photo.jpg: RuntimeError: Failed to decode")
    with pytest.raises(DataError, match=r"photo.jpg: RuntimeError.*data.on_error: skip"):
        everything(make_data(source))


def test_spoilt_idx_files(tmp_path: Path) -> None:
    source = write_idx(tmp_path, IMAGES, LABELS)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(LABELS[:-1]))
    with pytest.raises(
        DataError, match=r"23 x 8 x 8 and .*: 22; expected images x rows x columns, and a label"
    ):
        listed(make_data(source))
    (tmp_path / "other").mkdir()
    short = write_idx(tmp_path / "other", IMAGES, LABELS, "t10k")
    assert len(listed(make_data(short)).refs) == 23  # the only ones there
    images = tmp_path / "other" / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-20])
    (tmp_path / "third").mkdir()
    images.rename(tmp_path / "third" / images.name)
    with pytest.raises(
        DataError, match=r"t10k-images-idx3-ubyte.gz' without its labels; expected .*labels-idx1"
    ):
        open_images(make_data(str(tmp_path / "third")))
    (tmp_path / "third" / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz: cannot be read: Compressed file ended"):
        listed(make_data(str(tmp_path / "third")))


def test_an_idx_file_that_ends_in_its_sizes(tmp_path: Path) -> None:
    source = write_idx(tmp_path, IMAGES, LABELS)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS)[:6])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: not a complete idx file: 6 bytes"):
        listed(make_data(source))


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.source: nothing at 'digit'; did you mean 'digits'\?"):
        open_images(make_data("digit"))
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no file to read among 1 .*a.txt'; expected .jpg, "):
        open_images(make_data(str(tmp_path)))
    (tmp_path / "a.png").write_bytes(encoded(IMAGES[0]))
    with pytest.raises(DataError, match=r"a.png' is in no class folder; expected FOLDER/CLASS/IMAGE"):
        listed(make_data(str(tmp_path)))
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"image files and tar files at .*; expected one kind"):
        open_images(make_data(str(tmp_path)))
    source = write_parquet(tmp_path / "hub", IMAGES, LABELS)
    with pytest.raises(DataError, match=r"data.split: no split 'trian' in .*did you mean 'train'\?"):
        open_images(make_data(f"hf:{source}", split="trian"))
    folders = write_folders(tmp_path / "f" / "train", IMAGES, LABELS)
    with pytest.raises(DataError, match=r"has files such as .*png'; expected .parquet or .tar"):
        open_images(make_data(f"hf:{Path(folders).parent}"))


def test_fingerprints_are_of_names_and_sizes(tmp_path: Path) -> None:
    for name in ("here", "there"):
        write_tars(tmp_path / name, IMAGES, LABELS)
    here, there = (open_images(make_data(str(tmp_path / name))) for name in ("here", "there"))
    assert here.info.fingerprint == there.info.fingerprint
    assert here.plan != there.plan
    write_tar(tmp_path / "there" / "shard-train-0000.tar", [{"png": encoded(IMAGES[0]), "cls": b"0"}])
    assert open_images(make_data(str(tmp_path / "there"))).info.fingerprint != here.info.fingerprint
