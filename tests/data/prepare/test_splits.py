"""What is held out: documents at the end, a named split, or everything; and filters and names of the result."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.data import TextDataConfig
from pipeline.config.load import parse
from pipeline.data.manifest import Manifest, check_fits
from pipeline.data.prepare import prepare, text, text_sources
from pipeline.data.prepare.source_files import SourceFile, by_split
from pipeline.data.prepare.text_sources import open_source
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, DataError
from pipeline.run import Run
from pipeline.training.launch import pretrain
from tests.support.data_helpers import lines, write_parquet
from tests.support.messy_text import prepare_here


def text_of(folder: Path, manifest: Manifest, split: str) -> str:
    reader = ShardReader(str(folder), manifest, split)
    return load_tokenizer("bytes").decode(reader.rows(np.arange(len(reader))).reshape(-1))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Splits in the names of files and of folders."""
    folder = tmp_path / "corpus"
    write_parquet(folder / "train-00000-of-00002.parquet", [f"train {i}" for i in range(20)])
    write_parquet(folder / "train-00001-of-00002.parquet", [f"train {i}" for i in range(20, 40)])
    (folder / "test.jsonl").write_bytes(lines([f"test {i}" for i in range(15)]))
    (folder / "dev").mkdir()
    (folder / "dev" / "a.jsonl").write_bytes(lines([f"dev {i}" for i in range(15)]))
    return folder


@pytest.mark.parametrize(("name", "marked"), [("test", "test"), ("validation", "dev")])
def test_named_split_of_files(name: str, marked: str, files: Path, tmp_path: Path) -> None:
    data = TextDataConfig(source=str(files), validation_split=name, length=4, text_filter=None)
    manifest = prepare_here(data, tmp_path / "out")
    assert {split: part.documents for split, part in manifest.splits.items()} == {
        "train": 40,
        "validation": 15,
    }
    train = "".join(f"train {i}<|endoftext|>" for i in range(40))
    held_out = "".join(f"{marked} {i}<|endoftext|>" for i in range(15))
    assert train.startswith(text_of(tmp_path / "out", manifest, "train"))
    assert held_out.startswith(text_of(tmp_path / "out", manifest, "validation"))
    assert manifest.splits["validation"].bytes == sum(len(f"{marked} {i}") for i in range(15))


def test_named_split_of_a_dataset_of_the_hub(files: Path, tmp_path: Path) -> None:
    (files / "dev" / "a.jsonl").unlink()
    (files / "test.jsonl").unlink()
    write_parquet(files / "test-00000-of-00001.parquet", [f"test {i}" for i in range(15)])
    data = TextDataConfig(source=f"hf:{files}", validation_split="test", length=4)
    assert [[piece.split for piece in unit] for unit in open_source(data).units] == [["train"]] * 2 + [
        ["test"]
    ]
    manifest = prepare_here(data, tmp_path / "out")
    assert text_of(tmp_path / "out", manifest, "validation").startswith("test 0<|endoftext|>test 1")
    assert manifest.splits["train"].documents == 40
    missing = data.model_copy(update={"validation_split": "tset"})
    with pytest.raises(DataError, match=r"cannot be opened: .*tset"):
        open_source(missing)


def test_everything_held_out(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TextDataConfig(source=str(files / "test.jsonl"), validation_documents="all", length=4)
    manifest = prepare_here(data, tmp_path / "out")
    assert list(manifest.splits) == ["validation"]
    assert manifest.splits["validation"].documents == 15
    assert text_of(tmp_path / "out", manifest, "validation").startswith("test 0<|endoftext|>test 1")
    with pytest.raises(DataError, match=r"no split 'train' in the data; known: validation"):
        ShardReader(str(tmp_path / "out"), manifest, "train")
    tree = {
        "data": data.model_dump(),
        "sampling": {"steps": 1},
        "cluster": {"storage": str(tmp_path)},
        "name": "a",
    }
    config = parse(tree, "test")
    with pytest.raises(ConfigError, match=r"data.validation_documents: 'all' holds every document out"):
        pretrain(config)
    with pytest.raises(DataError, match=r"data.validation_documents: .*hold.* for evaluation only"):
        check_fits(manifest, config)


def test_everything_of_one_split_held_out(files: Path, tmp_path: Path) -> None:
    """Files of other splits are not evaluated; without splits in their names, all files are."""
    data = TextDataConfig(source=str(files), split="test", validation_documents="all", length=4)
    assert prepare_here(data, tmp_path / "test").documents == 15
    (files / "plain").mkdir()
    for name in ("a.txt", "b.txt"):
        (files / "plain" / name).write_text("some text that fills a row")
    data = data.model_copy(update={"source": str(files / "plain")})
    assert prepare_here(data, tmp_path / "plain").documents == 2


def test_bpe_of_a_named_split_sees_no_other(files: Path, tmp_path: Path) -> None:
    source = files / "train-00000-of-00002.parquet"
    write_parquet(source, [f"the cat sat on the mat {i} the cat" for i in range(20)])
    data = TextDataConfig(source=str(files), validation_split="test", length=4, tokenizer="bpe:262")
    prepare_here(data, tmp_path / "out")
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    (files / "test.jsonl").write_bytes(lines([f"other words {i} words words" for i in range(15)]))
    prepare_here(data, tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again" / "tokenizer")).hash == tokenizer.hash


def test_large_text_gives_a_sample_to_the_tokenizer(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextDataConfig(source=str(files), validation_split="test", tokenizer="bpe:262")
    monkeypatch.setattr(text, "FIT_BYTES", 30)
    seen = list(text._training_texts(data, open_source(data)))
    assert sum(map(len, seen[:-1])) < 30 <= sum(map(len, seen))
    monkeypatch.setattr(text_sources, "UNIT_FILES", 1)
    assert set(seen) < {f"train {i}" for i in range(40)}
    monkeypatch.setattr(text, "FIT_BYTES", 1 << 20)
    kept = data.model_copy(update={"validation_split": None, "validation_documents": 17})
    documents = sorted(
        text._training_texts(kept, open_source(kept))
    )  # 2 of the last unit's 15, with 20 before
    assert documents == sorted(
        [*(f"dev {i}" for i in range(15)), *(f"test {i}" for i in range(15))]
        + [f"train {i}" for i in range(23)]
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"validation_split": "test", "validation_documents": 5},
            "both say what is held out; expected one of them",
        ),
        ({"validation_split": "train"}, "validation_split 'train' is split as well"),
        (
            {"validation_documents": "al"},
            r"data.validation_documents: 'al'; expected a number of at least 1, or all; did you mean 'all'",
        ),
        (
            {"validation_documents": 0},
            "data.validation_documents: 0; expected a number of at least 1, or all",
        ),
        ({"tokenizer": "bpe:256"}, "expected bpe:N with an N of at least 257"),
        ({"tokenizer": "bpe:many"}, "expected bpe:N with an N of at least 257"),
        (
            {"tokenizer": "bpe:300", "validation_documents": "all"},
            "leaves none; expected the folder of a model",
        ),
        ({"text_filter": "wikitxt"}, "wikitext"),
    ],
)
def test_settings_that_conflict(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse({"name": "a", "data": settings, "sampling": {"steps": 1}}, "test")


def test_splits_that_are_not_there(files: Path) -> None:
    with pytest.raises(
        DataError, match=r"no file with the split 'tests'.*such as dev/a.jsonl.*did you mean 'test'"
    ):
        open_source(TextDataConfig(source=str(files), validation_split="tests"))
    with pytest.raises(
        DataError, match=r"validation_split: 'pydoc' has no splits; expected data.validation_doc"
    ):
        open_source(TextDataConfig(validation_split="test"))
    both = [SourceFile("/a/train/test.txt", "train/test.txt", 1, "")]
    with pytest.raises(DataError, match=r"'/a/train/test.txt' has more than one of the splits"):
        by_split(both, "train", "test")


def test_settings_that_are_not_set_leave_the_name_of_the_data() -> None:
    """Data of earlier versions has neither key in its content, and is found again."""
    values = text.content(TextDataConfig())
    assert not {"text_filter", "validation_split"} & values.keys()
    assert values["validation_documents"] == 100_000
    assert text.content(TextDataConfig(validation_documents=100_000)) == values
    names = {
        prepare._folder_name(TextDataConfig(**settings))
        for settings in (
            {}, {"text_filter": "ptb"}, {"validation_split": "test"}, {"validation_documents": "all"},
            {"tokenizer": "bpe:300"}, {"tokenizer": "bpe:301"}, {"tokenizer": "text8"},
        )
    }  # fmt: skip
    assert len(names) == 7


def test_filtered_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["In 1905 , he", "- - -", "went  on!"] * 9))
    data = TextDataConfig(
        source=str(tmp_path / "a.jsonl"),
        tokenizer="text8",
        text_filter="text8",
        length=4,
        validation_documents=3,
    )
    manifest = prepare_here(data, tmp_path / "out")
    reader = ShardReader(str(tmp_path / "out"), manifest, "train")
    train = load_tokenizer("text8").decode(reader.rows(np.arange(len(reader))).reshape(-1))
    assert train.startswith("in one nine zero five he<|endoftext|> <|endoftext|>went on <|endoftext|>in one")
    assert manifest.splits["validation"].bytes == len("in one nine zero five he") + 1 + len("went on ")
    assert manifest.vocabulary == 28
    unfiltered = data.model_copy(update={"text_filter": None})
    with pytest.raises(DataError, match=r"a.jsonl line 1: character 'I' at 0; expected a to z"):
        prepare_here(unfiltered, tmp_path / "refused")


def test_run_reads_the_tokenizer_beside_its_shards(files: Path, tmp_path: Path) -> None:
    data = {
        "source": str(files / "test.jsonl"),
        "tokenizer": "bpe:258",
        "length": 4,
        "validation_documents": 3,
    }
    tree = {"name": "a", "data": data, "sampling": {"steps": 1}, "cluster": {"storage": str(tmp_path)}}
    run = Run.of(parse(tree, "test"))
    manifest = prepare_here(run.config.data, Path(run.data_path))  # type: ignore[arg-type]
    assert run.text_tokenizer.hash == manifest.tokenizer.hash
    check_fits(
        manifest, run.config.model_copy(update={"train": run.config.train.model_copy(update={"batch": 8})})
    )
    other = parse({**tree, "data": {**data, "tokenizer": "bpe:259"}, "train": {"batch": 8}}, "test")
    with pytest.raises(DataError, match=r"data.tokenizer: the data has 'bpe:258', the config 'bpe:259'"):
        check_fits(manifest, other)


def test_a_damaged_document_ends_the_training_of_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(["some words", "more words"]) + b'{"text": 5}\n' + lines(["the last words"] * 3))
    data = TextDataConfig(source=str(file), tokenizer="bpe:258", length=4, validation_documents=1)
    with pytest.raises(DataError, match=r"a.jsonl line 3: 'text' holds a int; expected text"):
        prepare_here(data, tmp_path / "out")
    manifest = prepare_here(data.model_copy(update={"on_error": "skip"}), tmp_path / "out")
    assert (manifest.documents, manifest.skipped.count) == (5, 1)
    few = data.model_copy(update={"validation_documents": 6, "on_error": "skip"})
    with pytest.raises(DataError, match=r"data.validation_documents: 6 of 5 documents would leave none"):
        prepare_here(few, tmp_path / "few")
