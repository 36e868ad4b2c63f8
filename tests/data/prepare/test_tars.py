"""Tar files as other tools write, join and damage them: every sample is read or named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.data import ImageDataConfig
from pipeline.data.prepare.image_sources import list_images, open_images
from pipeline.data.prepare.images import read_pixels
from tests.support.image_helpers import encoded, make_images

IMAGES, LABELS = make_images(4)
GOOD = [
    (f"s/{i}.{end}", content)
    for i in range(4)
    for end, content in (("png", encoded(IMAGES[i])), ("cls", b"%d" % LABELS[i]))
]
Members = list[tuple[str | tarfile.TarInfo, bytes]]


def tar(members: Members, **options: object) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", **options) as file:  # type: ignore[call-overload]
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def found(content: bytes, folder: Path, **settings: object) -> tuple[list[int], list[str]]:
    """The labels of the images that are read, whose pixels are as they were, and the problems."""
    path = folder / "a.tar"
    path.write_bytes(content)
    data = ImageDataConfig(kind="image", source=str(path), classes=3, on_error="skip", **settings)  # type: ignore[arg-type]
    listing = list_images(open_images(data), data)
    pixels = read_pixels(listing.refs, data)
    for image, ref in zip(pixels.images, listing.refs, strict=True):
        number = int(ref.name.rpartition("/")[2].partition(".")[0]) % 4
        assert np.array_equal(image[..., 0], IMAGES[number])
    problems = [str(problem).removeprefix(str(path)).lstrip(": ") for problem in listing.problems]
    return pixels.labels.tolist(), problems + pixels.problems


WANTED = LABELS.tolist()


@pytest.mark.parametrize(
    "members",
    [
        [
            pair
            for name, content in GOOD
            for pair in ((name.replace("/", "/._"), b"\0\5\x16\7"), (name, content))
        ],
        [("README.md", b"read me"), *GOOD[:2], ("s/LICENSE", b"free"), *GOOD[2:], ("s/0.txt.bak", b"old")],
        [*GOOD[::2], *GOOD[1::2]],
        [*GOOD[1::2], ("__MACOSX/s/x.png", b"none"), *GOOD[::2]],
        [(f"./{name.upper()}", content) for name, content in GOOD],
        [(f"../{name}", content) for name, content in GOOD],
    ],
    ids=["between hidden members", "among others", "by kind", "labels first", "capitals", "above"],
)
def test_members_that_are_no_samples_lose_none(members: Members, tmp_path: Path) -> None:
    assert found(tar(members), tmp_path) == (WANTED, [])


def test_joined_archives_are_read(tmp_path: Path) -> None:
    content = tar(GOOD[:4]) + tar(GOOD[4:])
    assert found(content, tmp_path) == (WANTED, [])
    repeated = tar(GOOD) + tar(GOOD)  # another sample of the same name
    assert found(repeated, tmp_path) == (WANTED * 2, [])


def test_links_are_followed(tmp_path: Path) -> None:
    links = [
        link("t/0.png", "s/0.png"),
        ("t/0.cls", b"2"),
        link("s/5.png", "1.png", tarfile.SYMTYPE),
        ("s/5.cls", b"1"),
    ]
    assert found(tar([*GOOD, *links]), tmp_path) == ([*WANTED, 2, 1], [])
    labels, problems = found(tar([*GOOD, link("s/6.png", "s/7.png"), ("s/6.cls", b"1")]), tmp_path)
    assert (labels, problems) == (WANTED, ["s/6: a link to 's/7.png', which is not in front of it"])


def test_a_tar_that_is_cut_anywhere_says_so(tmp_path: Path) -> None:
    """In a header, in a member, between members; what is in front of the cut is read."""
    content = tar(GOOD)
    with tarfile.open(fileobj=io.BytesIO(content)) as whole:
        ends = [*(info.offset for info in whole.getmembers()[1:]), whole.offset]
    for number, end in enumerate(ends, 1):
        for cut in (end, end + 100, end - 1 - (end - 1) % 512):
            labels, problems = found(content[:cut], tmp_path)
            (problem,) = problems
            assert problem.startswith("cannot be read to the end: ReadError: "), problem
            assert WANTED[: (number - 1) // 2] == labels[: (number - 1) // 2]
            assert labels == WANTED[: len(labels)]
    assert "is cut inside a header at byte" in found(content[: ends[3] + 100], tmp_path)[1][0]
    assert found(content[: ends[-1]], tmp_path)[0] == WANTED


def test_a_damaged_header_says_so(tmp_path: Path) -> None:
    content = bytearray(tar(GOOD))
    with tarfile.open(fileobj=io.BytesIO(content)) as whole:
        place = whole.getmembers()[4].offset
    content[place : place + 100] = b"?" * 100
    labels, problems = found(bytes(content), tmp_path)
    assert labels == WANTED[:2]
    assert problems == [f"cannot be read to the end: ReadError: damaged header at byte {place}"]
    labels, problems = found(tar(GOOD) + b"garbage".ljust(512, b"x"), tmp_path)
    assert labels == WANTED
    assert "damaged header" in problems[0]


@pytest.mark.parametrize(
    ("name", "label", "says"),
    [
        ("4.json", b"[" * 100_000, "s/4: no label in json: maximum recursion depth exceeded"),
        ("4.json", b'{"label": ' + b"1" * 5000 + b"}", "s/4: no label in json: Exceeds the limit"),
        ("4.json", b'{"label": true}', "s/4: label True; expected 0 to 2"),
        ("4.json", b"[1]", "s/4: no label in json: list indices must be integers"),
        ("4.cls", b"\xff", "s/4: no label in cls: 'utf-8' codec"),
    ],
)
def test_a_bad_label_costs_one_sample(name: str, label: bytes, says: str, tmp_path: Path) -> None:
    members = [("s/4.png", encoded(IMAGES[0])), (f"s/{name}", label), *GOOD]
    labels, (problem,) = found(tar(members), tmp_path)
    assert labels == WANTED
    assert problem.startswith(says)


def test_labels_with_a_byte_order_mark(tmp_path: Path) -> None:
    members = [
        (name, b"\xef\xbb\xbf" + content if name.endswith("cls") else content) for name, content in GOOD
    ]
    assert found(tar(members), tmp_path) == (WANTED, [])


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    members = [*GOOD, ("s/\udcff.png", encoded(IMAGES[0])), ("s/\udcff.cls", b"x")]
    labels, (problem,) = found(tar(members, errors="surrogateescape"), tmp_path)
    assert labels == WANTED
    assert json.dumps(problem)
    assert problem.encode("utf-8").startswith(b"s/\\udcff: no label in cls")


def test_many_suffixes_are_not_all_listed(tmp_path: Path) -> None:
    members = [(f"s/photo.{i}.png", b"") for i in range(100)]
    _, (problem,) = found(tar(members), tmp_path)
    assert problem.startswith("s/photo: no image among 0.png, 1.png, ")
    assert len(problem) < 200
