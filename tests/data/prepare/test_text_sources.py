"""Sources: the same documents from every kind of file, whole or in parts, and every fault named."""

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.data import TextDataConfig
from pipeline.data.prepare import markov, text_sources
from pipeline.data.prepare.source_files import Problem, reached
from pipeline.data.prepare.text_sources import open_source, read
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import DataError
from tests.support.data_helpers import DOCUMENTS, lines, write_parquet, write_ranks


def everything(source: str, **settings: str) -> list[str | Problem]:
    data = TextDataConfig.model_validate({"source": source, **settings})
    return [document for unit in open_source(data).units for piece in unit for document in read(piece, data)]


def problems(source: str, **settings: str) -> list[str]:
    return [str(item) for item in everything(source, **settings) if isinstance(item, Problem)]


def test_pydoc() -> None:
    documents = everything("pydoc")
    assert len(documents) > 50
    assert sum(len(str(d)) for d in documents) > 300_000
    assert documents == everything("pydoc")


def test_a_dataset_with_a_loading_script_is_refused(tmp_path: Path) -> None:
    """As OpenWebText had one; `datasets` runs none from version 4 on."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.py").write_text("raise AssertionError('the script ran')")
    with pytest.raises(DataError, match=r"data\.source: 'hf:.*corpus.py; expected a dataset of data files"):
        everything(f"hf:{tmp_path / 'corpus'}")


def test_entropy_of_the_known_source_is_that_of_its_documents() -> None:
    documents = [str(document) for document in everything("markov")]
    assert documents == everything("markov")
    rows = np.array([[markov.LETTERS.index(letter) for letter in text] for text in documents[:16]])
    chain = markov.embedded()
    chances = chain.first
    np.testing.assert_allclose(chances @ chain.transitions, chances, atol=1e-12)
    nats = -np.log(chain.transitions[rows[:, :-1], rows[:, 1:]]).mean()
    assert nats == pytest.approx(chain.entropy(rows.shape[1]), rel=2e-3)
    assert chain.entropy(1) == pytest.approx(-(chances * np.log(chances)).sum(), rel=1e-12)


def test_every_kind_gives_the_same_documents(tmp_path: Path) -> None:
    txt = tmp_path / "txt"
    txt.mkdir()
    for i, document in enumerate(DOCUMENTS):
        (txt / f"{i:03d}.txt").write_bytes(document.encode())
    (txt / "README.md").write_text("not a document")
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines()))
    (tmp_path / "a.jsonl.zst").write_bytes(pa.compress(lines(), "zstd", asbytes=True))
    write_parquet(tmp_path / "two" / "b.parquet", DOCUMENTS[20:])
    write_parquet(tmp_path / "two" / "a.parquet", DOCUMENTS[:20])
    write_parquet(tmp_path / "hub" / "plain_text" / "train-00000-of-00002.parquet", DOCUMENTS[:20])
    write_parquet(tmp_path / "hub" / "plain_text" / "train-00001-of-00002.parquet", DOCUMENTS[20:])
    for source in (
        "txt",
        "txt/*.txt",
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "two",
        "two/[ab].parquet",
        "file://two",
    ):
        full = f"file://{tmp_path}/two" if source.startswith("file") else str(tmp_path / source)
        assert everything(full) == DOCUMENTS, source
    assert everything(f"hf:{tmp_path / 'hub'}") == DOCUMENTS


def test_remote_files() -> None:
    from pipeline import storage

    storage.publish_bytes("memory://corpus-of-sources/a.jsonl", lines(DOCUMENTS[:9]))
    storage.publish_bytes("memory://corpus-of-sources/b.jsonl", lines(DOCUMENTS[9:]))
    assert everything("memory://corpus-of-sources") == DOCUMENTS
    assert everything("memory://corpus-of-sources/b*.jsonl") == DOCUMENTS[9:]


@pytest.mark.parametrize("size", [64, 97, 1000])
def test_large_files_are_split_without_changing_anything(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sources, "UNIT_BYTES", size)
    (tmp_path / "a.jsonl").write_bytes(lines())
    write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    for name in ("a.jsonl", "a.parquet"):
        assert len(open_source(TextDataConfig(source=str(tmp_path / name))).units) > 2
        assert everything(str(tmp_path / name)) == DOCUMENTS
    (tmp_path / "a.jsonl").write_bytes(lines()[:-1] + b"\n\xff\n" + lines())
    assert problems(str(tmp_path / "a.jsonl")) == [
        f"{tmp_path}/a.jsonl line 41: not UTF-8: invalid start byte at byte 0 of the line"
    ]


def test_small_files_are_bundled(tmp_path: Path) -> None:
    for i in range(130):
        (tmp_path / f"{i:03d}.txt").write_text("x")
    units = open_source(TextDataConfig(source=str(tmp_path))).units
    assert [len(unit) for unit in units] == [64, 64, 2]


def test_the_fingerprint_follows_the_files_and_not_their_place(tmp_path: Path) -> None:
    def fingerprint(folder: str, files: dict[str, str]) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        return open_source(TextDataConfig(source=str(tmp_path / folder))).info.fingerprint

    one = fingerprint("one", {"a.txt": "a", "b.txt": "bb"})
    assert fingerprint("two", {"a.txt": "a", "b.txt": "cc"}) == one
    assert fingerprint("three", {"a.txt": "a", "c.txt": "bb"}) != one
    assert fingerprint("two", {"b.txt": "ccc"}) != one


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"good \xff bad", r"a.txt: not UTF-8: invalid start byte at byte 5"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a.jsonl line 2: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl line 1: not UTF-8"),
        ("a.jsonl", b'\n{"txt": "x"}\n', r"line 2: no field 'text' .*fields: txt; did you mean 'txt'"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: 'text' holds a NoneType; expected text"),
        ("a.jsonl", b"[1]\n", r"line 1: a list; expected an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl line 1: not UTF-8: surrogates"),
        ("a.jsonl.gz", gzip.compress(lines())[:-20], r"a.jsonl.gz: cannot be read to the end: EOFError"),
        ("a.jsonl.gz", b"", r"a.jsonl.gz: cannot be read to the end: EOFError: 0 bytes"),
        ("a.jsonl.zst", b"", r"a.jsonl.zst: cannot be read to the end: EOFError: 0 bytes"),
        ("a.jsonl.gz", b"plain", r"cannot be read to the end: BadGzipFile"),
        ("a.jsonl.zst", pa.compress(lines(), "zstd", asbytes=True)[:-20], r"zst: .*Truncated"),
        ("a.parquet", b"PAR1 and so on", r"a.parquet: cannot be read to the end"),
    ],
)
def test_faults_are_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.jsonl").write_bytes(lines(DOCUMENTS[:3]))
    found = everything(str(tmp_path))
    assert found[-3:] == DOCUMENTS[:3]  # what follows is read
    (fault,) = [item for item in found if isinstance(item, Problem)]
    assert re.search(says, str(fault)), str(fault)


def test_faults_of_parquet_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    assert problems(str(tmp_path)) == [f"{tmp_path}/a.parquet row 1: 'text' holds a NoneType; expected text"]
    assert "fields: text" in problems(str(tmp_path), text_field="tex")[0]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            b'{"text": "x", "m": ' + b"[" * 5000 + b"]" * 5000 + b"}",
            "RecursionError: maximum recursion depth",
        ),
        (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "ValueError: Exceeds the limit"),
        (b'{"te\\ud83dxt": "x"}', r"no field 'text' .*te\\ud83dxt"),
        (b'{"text": {"\\udc00": 1}}', "'text' holds a dict"),
        (b"\xff\xfe{", "not UTF-8"),
        (b"\0" * 99, "not JSON"),
    ],
)
def test_a_bad_line_costs_only_itself(record: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(DOCUMENTS[:3]) + record + b"\n" + lines(DOCUMENTS[3:]))
    found = everything(str(tmp_path))
    assert [item for item in found if isinstance(item, str)] == DOCUMENTS
    assert re.match(rf"{tmp_path}/a.jsonl line 4: {says}", str(found[3]))
    assert str(found[3]).encode("utf-8")  # a manifest can hold it


def test_a_bad_row_of_parquet_costs_only_itself(tmp_path: Path) -> None:
    cells = pa.array([b"a", b"\xff", b"c"]).view(pa.utf8())
    pq.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    one, bad, three = everything(str(tmp_path))
    assert (one, three) == ("a", "c")
    assert str(bad) == f"{tmp_path}/a.parquet row 1: not UTF-8: invalid start byte at byte 0"


def test_a_damaged_group_of_rows_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    options = {"row_group_size": 10, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"text": DOCUMENTS}), path, **options)
    content = bytearray(path.read_bytes())
    start = content.index(DOCUMENTS[10].encode())
    content[start - 30 : start] = bytes(30)  # the header of the page
    path.write_bytes(content)
    found = everything(str(path))
    assert [item for item in found if isinstance(item, str)] == DOCUMENTS[:10] + DOCUMENTS[20:]
    assert re.match(rf"{path} row 10: cannot be read, nor .* up to row 19: \w+", str(found[10]))


def test_byte_order_marks(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + lines(DOCUMENTS[:3]) + mark + lines(DOCUMENTS[3:]) + mark)
    (tmp_path / "b.txt").write_bytes(mark + b"text\r\n")
    (tmp_path / "c.txt").write_bytes(mark)
    assert everything(str(tmp_path)) == [*DOCUMENTS, "text\r\n", ""]


def test_suffixes_in_capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "UNIT_BYTES", 1000)
    (tmp_path / "A.JSONL").write_bytes(lines())
    (tmp_path / "B.Jsonl.GZ").write_bytes(gzip.compress(lines()))
    (tmp_path / "C.JSONL.ZST").write_bytes(pa.compress(lines(), "zstd", asbytes=True))
    write_parquet(tmp_path / "D.PARQUET", DOCUMENTS)
    (tmp_path / "E.TXT").write_text("text")
    assert everything(str(tmp_path)) == [*DOCUMENTS * 4, "text"]
    split = {
        piece.path
        for unit in open_source(TextDataConfig(source=str(tmp_path))).units
        for piece in unit
        if piece.stop > 0
    }
    assert split == {f"{tmp_path}/A.JSONL", f"{tmp_path}/D.PARQUET"}


def test_joined_compressed_files(tmp_path: Path) -> None:
    halves = [lines(DOCUMENTS[:9]), lines(DOCUMENTS[9:])]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    (tmp_path / "b.jsonl.zst").write_bytes(
        b"".join(pa.compress(half, "zstd", asbytes=True) for half in halves)
    )
    assert everything(str(tmp_path)) == DOCUMENTS * 2


def test_a_document_that_the_tokenizer_refuses_costs_only_itself(tmp_path: Path) -> None:
    """GPT-2's search for words fails at a million spaces in front of a word."""
    tokenizer = load_tokenizer(write_ranks(tmp_path / "small.tiktoken"))
    (tmp_path / "a.jsonl").write_bytes(lines(["one", " " * 1_000_000 + "x", "two"]))
    data = TextDataConfig(source=str(tmp_path / "a.jsonl"))
    ((piece,),) = open_source(data).units
    one, bad, two = read(piece, data, tokenizer.encode)
    assert [tokenizer.decode(ids) for ids in (one, two) if not isinstance(ids, Problem)] == ["one", "two"]
    assert str(bad).startswith(
        f"{tmp_path}/a.jsonl line 2: 1000001 characters cannot be tokenised: ValueError"
    )


def test_an_outage_is_no_fault_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> bytes:
        raise ConnectionResetError("reset by peer")

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(text_sources.storage, "read_bytes", fail)
    with pytest.raises(ConnectionResetError):
        everything(str(tmp_path))
    says = r"^data.source: 'x' cannot be reached: ConnectionResetError: reset"
    with pytest.raises(DataError, match=says), reached("x"):
        everything(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("pydok", r"data.source: nothing at 'pydok'; did you mean 'pydoc'"),
        ("{}/corpu", r"nothing at '.*corpu'; did you mean 'corpus'"),
        ("{}/corpus", r"no file to read among 1 at .*a.md'; expected .txt, .jsonl"),
        ("{}/*.parquet", r"nothing at"),
        ("hf:{}/corpus", r"data.source: 'hf:.*corpus' cannot be opened"),
    ],
)
def test_nothing_to_read(source: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.md").write_text("x")
    with pytest.raises(DataError, match=says):
        everything(source.format(tmp_path))
