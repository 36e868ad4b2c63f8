"""Listing: paths of any characters, linked and hidden files, names that are not UTF-8, sources that do not answer."""

import os
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config.data import ImageDataConfig, TextDataConfig
from pipeline.data.prepare.image_sources import open_images
from pipeline.data.prepare.source_files import Problem, find, list_files
from pipeline.data.prepare.text_sources import open_source, read
from pipeline.errors import DataError
from tests.support.image_helpers import make_images, write_folders

TEXT = (".txt", ".jsonl")
ODD = ["a[1]", "a::b", "what?", "my%20data", "x #1", "*.txt", "a: b", "~", "{x}", "ü"]


def names(source: str) -> list[str]:
    return [file.name for file in find(source, TEXT)]


def write(file: Path, content: bytes = b"x") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def texts(source: str) -> list[str | Problem]:
    data = TextDataConfig(source=source)
    return [text for unit in open_source(data).units for piece in unit for text in read(piece, data)]


@pytest.mark.parametrize("odd", ODD)
def test_a_path_that_exists_is_taken_as_it_is(odd: str, tmp_path: Path) -> None:
    write(tmp_path / odd / f"{odd}.txt")
    for decoy in (
        "a1",
        "what!",
        "x",
        "my data",
        "b.txt",
    ):  # what a pattern, a URL or a comment would make of it
        write(tmp_path / decoy / f"{decoy}.txt", b"other")
    folder = f"{tmp_path}/{odd}"
    for source in (
        folder,
        f"file://{folder}",
        f"{folder}/{odd}.txt",
        f"{folder}/*.txt",
        f"{folder}/**/*.txt",
    ):
        assert names(source) == [f"{odd}.txt"]
        assert texts(source) == ["x"]


@pytest.mark.parametrize("odd", ["a[1]", "a::b", "my%20data", "x #1", "*.txt"])
def test_a_url_that_exists_is_taken_as_it_is(odd: str) -> None:
    base = f"memory://odd-{abs(hash(odd))}"
    storage.publish_bytes(f"{base}/{odd}/{odd}.txt", b"x")
    storage.publish_bytes(f"{base}/a1/a1.txt", b"other")
    for source in (f"{base}/{odd}", f"{base}/{odd}/{odd}.txt"):
        assert names(source) == [f"{odd}.txt"]
        assert texts(source) == ["x"]


def test_removing_a_url_removes_nothing_that_it_would_match() -> None:
    for name in ("a[bc]", "ab"):
        storage.publish_bytes(f"memory://magic/{name}/x", b"x")
    storage.remove("memory://magic/a[bc]")
    assert storage.listing("memory://magic") == ["ab"]


def test_globs(tmp_path: Path) -> None:
    for name in ("a/x.txt", "a/deep/y.txt", "b/x.txt", "b/x.md", "c.txt", ".d/x.txt"):
        write(tmp_path / name)
    assert names(f"{tmp_path}/*/x.txt") == ["a/x.txt", "b/x.txt"]
    assert names(f"{tmp_path}/**/*.txt") == ["a/deep/y.txt", "a/x.txt", "b/x.txt", "c.txt"]
    assert names(f"{tmp_path}/[!b]*") == ["a/deep/y.txt", "a/x.txt", "c.txt"]
    assert names(f"{tmp_path}/a/**") == ["deep/y.txt", "x.txt"]
    assert names(f"{tmp_path}/.*/x.txt") == [".d/x.txt"]  # hidden files are read where the source names them
    with pytest.raises(DataError, match="nothing at"):
        names(f"{tmp_path}/c.txt/*.txt")


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "sub" / "b.txt")
    write(tmp_path / "source" / "a.txt")
    (tmp_path / "source" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "link.txt").symlink_to(tmp_path / "elsewhere" / "sub" / "b.txt")
    for name in ("up", "again"):
        (tmp_path / "elsewhere" / name).symlink_to(tmp_path / "source")
    wanted = ["a.txt", "link/sub/b.txt", "link.txt"]
    assert sorted(names(f"{tmp_path}/source")) == sorted(wanted)
    assert sorted(names(f"{tmp_path}/source/**/*.txt")) == sorted(wanted)
    (tmp_path / "whole").symlink_to(tmp_path / "source")
    assert sorted(names(f"{tmp_path}/whole")) == sorted(wanted)


def test_links_without_a_target_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "c.txt")
    text, gone, circle = texts(str(tmp_path))
    assert text == "x"
    assert str(gone).startswith(f"{tmp_path}/b.txt: cannot be read to the end: FileNotFoundError")
    assert str(circle).startswith(f"{tmp_path}/c.txt: cannot be read to the end: OSError")


def test_pipes_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    assert texts(str(tmp_path)) == ["x"]


def test_hidden_files_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    for name in (
        "._a.txt",
        ".git/b.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "__MACOSX/c.txt",
        "sub/.d.txt",
    ):
        write(tmp_path / "source" / name, b"\0\5\x16\7not text")
    write(tmp_path / "source" / "sub" / "a.txt")
    assert names(f"{tmp_path}/source") == ["sub/a.txt"]
    assert names(f"{tmp_path}/source/*") == ["sub/a.txt"]
    storage.publish_folder(tmp_path / "source", "memory://hidden-files")
    assert names("memory://hidden-files") == ["sub/a.txt"]
    assert names(f"{tmp_path}/source/sub/.d.txt") == [".d.txt"]  # the user names it
    write(tmp_path / ".cache" / "corpus" / "a.txt")
    assert names(f"{tmp_path}/.cache/corpus") == ["a.txt"]


def test_nothing_but_hidden_files(tmp_path: Path) -> None:
    write(tmp_path / ".a.txt")
    with pytest.raises(DataError, match=rf"^data.source: no file at '{tmp_path}', besides hidden ones"):
        names(str(tmp_path))


def test_hidden_folders_of_images(tmp_path: Path) -> None:
    write_folders(tmp_path / ".cache" / "images", *make_images(6))
    data = ImageDataConfig(kind="image", source=f"{tmp_path}/.[a-c]*/images/*/*.png")
    assert len(open_images(data).files) == 6


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name, content in ((b"\xff.txt", b"x"), (b"\xfe.txt", b"\xff")):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(content)
    bad, good = texts(str(tmp_path))
    assert good == "x"
    assert str(bad) == f"{tmp_path}/\\udcfe.txt: not UTF-8: invalid start byte at byte 0"


def test_one_line_of_control_characters(tmp_path: Path) -> None:
    write(tmp_path / "a\nb.txt", b"\xff")
    (bad,) = texts(str(tmp_path))
    assert str(bad).startswith(f"{tmp_path}/a\\nb.txt: not UTF-8")


def test_sources_that_do_not_answer() -> None:
    with pytest.raises(
        DataError, match=r"^data.source: 'http://127.0.0.1:9/a.jsonl' cannot be reached: .*connect"
    ) as e:
        find("http://127.0.0.1:9/a.jsonl", TEXT)
    assert "\n" not in str(e.value)
    for source in ("s3://", "s3:///corpus", "gs://"):
        with pytest.raises(
            DataError, match=rf"^data.source: '{source}' names no bucket; expected ..://BUCKET/"
        ):
            find(source, TEXT)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's folder is; the tests may run as root, who can list all."""
    write(tmp_path / "sub" / "a.txt")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"data.source: .*/sub: cannot be listed: Permission denied"):
        find(str(tmp_path), TEXT)


def test_names_of_a_local_copy_of_a_dataset(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.txt")
    assert [file.name for file in list_files(str(tmp_path), str(tmp_path))] == ["/data/a.txt"]
