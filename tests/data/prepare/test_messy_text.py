"""Ids read back from shards are those of the reference libraries on the whole documents, however they were made."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers

from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import TOKENIZER, Manifest
from pipeline.data.prepare import text_sources
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import PATTERN, load_tokenizer
from tests.support.data_helpers import MERGES, lines, shard_bytes, write_ranks
from tests.support.messy_text import messy_lines, prepare_here, word_piece_vocabulary

LINES = messy_lines(10_000)
HELD_OUT = 777

Encode = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON Lines file with a messy document in every line, a WordPiece vocabulary and a rank file."""
    folder = tmp_path_factory.mktemp("messy")
    (folder / "lines.jsonl").write_bytes(lines(LINES))
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(word_piece_vocabulary()), encoding="utf-8")
    write_ranks(folder / "small.tiktoken", [*MERGES, b"\xe3\x81", b" \xd0", b"an", b"and"])
    return folder


def reference(name: str, corpus: Path, prepared: Path) -> Encode:
    """The encoding of whole documents by the library that the tokenizer comes from."""
    if name == "bytes":
        return lambda text: list(text.encode())
    if name == "small.tiktoken":
        ranks = load_tiktoken(corpus / name)
        return tiktoken.Encoding(
            "r", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        ).encode_ordinary
    if name == "bert":
        library = tokenizers.BertWordPieceTokenizer(str(corpus / name / "vocab.txt"))._tokenizer
    else:
        library = tokenizers.Tokenizer.from_file(str(prepared / TOKENIZER / "tokenizer.json"))
    library.encode_special_tokens = True
    return lambda text: library.encode(text, add_special_tokens=False).ids


def load_tiktoken(path: Path) -> dict[bytes, int]:
    from tiktoken.load import load_tiktoken_bpe

    return load_tiktoken_bpe(str(path))


@pytest.mark.parametrize("name", ["bytes", "bert", "bpe:400", "small.tiktoken"])
def test_ids_are_those_of_the_reference(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = str(corpus / name) if (corpus / name).exists() else name
    data = TextDataConfig(
        source=str(corpus / "lines.jsonl"),
        tokenizer=spec,
        length=64,
        validation_documents=HELD_OUT,
        shard_rows=999,
    )
    manifest = prepare_here(data, tmp_path / "whole")
    tokenizer = load_tokenizer(str(tmp_path / "whole" / TOKENIZER))
    assert manifest.tokenizer.hash == tokenizer.hash
    encode = reference(name, corpus, tmp_path / "whole")
    documents = [(text, ids) for text in LINES if (ids := encode(text))]
    assert manifest.documents == len(documents) == len(LINES) - manifest.documents_empty
    for split, part in (("train", documents[:-HELD_OUT]), ("validation", documents[-HELD_OUT:])):
        reader = ShardReader(str(tmp_path / "whole"), manifest, split)
        rows = reader.rows(np.arange(len(reader))).reshape(-1)
        expected = [i for _, ids in part for i in [*ids, tokenizer.eot]]
        about = manifest.splits[split]
        assert rows.tolist() == expected[: len(rows)]
        assert len(rows) + about.tokens_dropped == about.tokens == len(expected)
        assert about.bytes == sum(len(text.encode()) for text, _ in part)
    monkeypatch.setattr(text_sources, "UNIT_BYTES", 100_000)  # 20 blocks, read on their own
    assert len(text_sources.open_source(data).units) > 10
    assert prepare_here(data, tmp_path / "blocks") == manifest
    assert shard_bytes(str(tmp_path / "blocks")) == shard_bytes(str(tmp_path / "whole"))


def test_bpe_is_trained_on_training_documents_alone(corpus: Path, tmp_path: Path) -> None:
    kept = [f"the cat number {i} sat on the mat with the dog" for i in range(60)]
    hidden = [f"zzyx qqwv {i} zzyx qqwv zzyx" for i in range(40)]
    hashes = []
    for name, documents, held_out in (("both", kept + hidden, 40), ("other", [*kept, "a last document"], 1)):
        file = tmp_path / f"{name}.jsonl"
        file.write_bytes(lines(documents))
        data = TextDataConfig(source=str(file), tokenizer="bpe:280", length=8, validation_documents=held_out)
        prepare_here(data, tmp_path / name)
        hashes.append(load_tokenizer(str(tmp_path / name / TOKENIZER)).hash)
    assert hashes[0] == hashes[1]
    vocabulary = json.loads((tmp_path / "both" / TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]
    assert "zz" not in vocabulary
    assert "Ġthe" in vocabulary


def test_earlier_manifests_have_no_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(["some words here"] * 9))
    manifest = prepare_here(
        TextDataConfig(source=str(file), length=8, validation_documents=2), tmp_path / "p"
    )
    # 15 bytes and an end of text a document
    assert manifest.bits_per_byte(1.5) == pytest.approx(1.5 * 16 / 15 / np.log(2))
    tree = json.loads(manifest.model_dump_json())
    for split in tree["splits"].values():
        del split["bytes"]
    assert Manifest.model_validate(tree).bits_per_byte(1.5) is None
    wrapped = manifest.model_copy(update={"wrap": "bos_eos"})
    assert wrapped.bits_per_byte(1.5) == pytest.approx(1.5 * 7 / 6 * 16 / 15 / np.log(2))
