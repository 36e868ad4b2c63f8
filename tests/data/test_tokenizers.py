"""Tokenizers: ids and back, identity by hash, folders that decode offline."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.tokenizers import PATTERN, BPETokenizer, load_tokenizer
from pipeline.data.tokenizers.ranks import read_ranks
from pipeline.errors import ConfigError, DataError
from tests.support.data_helpers import MERGES, write_ranks

TEXTS = ["The thing, then: the end.", "zwölf ☃ 語", "", " \n\n  x", "<|endoftext|>"]


@pytest.fixture
def ranks(tmp_path: Path) -> str:
    return write_ranks(tmp_path / "small.tiktoken")


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    ids = tokenizer.encode_batch(TEXTS)
    assert [i.tolist() for i in ids] == [list(t.encode()) for t in TEXTS]
    assert [tokenizer.decode(i) for i in ids] == TEXTS
    assert tokenizer.decode([72, 256, 105, 0xFF]) == "H<|endoftext|>i�"


def test_text8() -> None:
    tokenizer = load_tokenizer("text8")
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.bos, tokenizer.pad) == (28, 27, None, None)
    assert tokenizer.encode(" az ").tolist() == [0, 1, 26, 0]
    assert tokenizer.decode([20, 8, 5, 0, 5, 14, 4, 27]) == "the end<|endoftext|>"
    for text, where in (("the End", "'E' at 4"), ("zwölf", "'ö' at 2"), ("a\n", r"'\\n' at 1")):
        with pytest.raises(
            DataError, match=f"character {where}; expected a to z and spaces.*text_filter: text8"
        ):
            tokenizer.encode(text)


def test_own_words_and_special_ids_of_an_encoding(ranks: str, tmp_path: Path) -> None:
    """As cl100k_base and p50k_base have them: other words, an end of text behind or among the ranks."""
    found = read_ranks(ranks)
    words, before = r"\p{L}+|[^\p{L}]", {token: i + (i >= 100) for token, i in found.items()}
    tokenizers = [
        BPETokenizer("a", found),
        BPETokenizer("a", found, words),
        BPETokenizer("a", found, words, eot=265, vocab_size=270),
        BPETokenizer("a", before, words, eot=100),
    ]
    assert len({tokenizer.hash for tokenizer in tokenizers}) == 4
    assert [(t.eot, t.vocab_size) for t in tokenizers] == [(262, 263), (262, 263), (265, 270), (100, 263)]
    assert [t.encode(" the").tolist() for t in tokenizers] == [
        [258],
        [32, 116, 257],
        [32, 116, 257],
        [32, 117, 258],
    ]
    for number, tokenizer in enumerate(tokenizers):
        tokenizer.save(tmp_path / str(number))
        again = load_tokenizer(str(tmp_path / str(number)))
        assert (again.hash, again.eot, again.vocab_size) == (
            tokenizer.hash,
            tokenizer.eot,
            tokenizer.vocab_size,
        )
        assert [again.decode(i) for i in again.encode_batch(TEXTS)] == TEXTS
        assert all(again.decode([i]) for i in range(again.vocab_size))


def test_folder_of_an_earlier_version(ranks: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ranks)
    tokenizer.save(tmp_path / "old")
    info = json.loads((tmp_path / "old" / "tokenizer_info.json").read_text())
    del info["pattern"], info["eot"]
    (tmp_path / "old" / "tokenizer_info.json").write_text(json.dumps(info))
    assert load_tokenizer(str(tmp_path / "old")).hash == tokenizer.hash


def test_encoding_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nothing answers
    with pytest.raises(ConfigError) as refused:
        load_tokenizer("cl100k_base")
    says = str(refused.value)
    assert "'cl100k_base' could not be downloaded" in says
    address = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    assert f"download {address} as {hashlib.sha1(address.encode()).hexdigest()}" in says


def test_ranks(ranks: str) -> None:
    tokenizer = load_tokenizer(ranks)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("small", 263, 262)
    ids = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode(i) for i in ids] == TEXTS
    assert tokenizer.encode_batch([" the thing"])[0].tolist() == [258, 256, ord("h"), 261]
    assert all(i.max(initial=0) < tokenizer.eot for i in ids)  # a special token's text is plain text
    assert tokenizer.decode([258, 262]) == " the<|endoftext|>"


def test_ranks_with_a_gap_decode_every_id(tmp_path: Path) -> None:
    path = Path(write_ranks(tmp_path / "gap.tiktoken"))
    path.write_bytes(path.read_bytes() + base64.b64encode(b" then") + b" 270\n")
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.eot == 271
    assert all(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))


def test_saved_folder_is_the_same_tokenizer(ranks: str, tmp_path: Path) -> None:
    for spec in ("bytes", ranks):
        tokenizer = load_tokenizer(spec)
        folder = tmp_path / tokenizer.name
        tokenizer.save(folder)
        again = load_tokenizer(str(folder))
        assert (again.name, again.hash, again.eot) == (tokenizer.name, tokenizer.hash, tokenizer.eot)
        for one, two in zip(tokenizer.encode_batch(TEXTS), again.encode_batch(TEXTS), strict=True):
            np.testing.assert_array_equal(one, two)


def test_hash_follows_the_ids(ranks: str, tmp_path: Path) -> None:
    other = write_ranks(tmp_path / "other.tiktoken", MERGES[:-1])
    (tmp_path / "copy.tiktoken").write_bytes(Path(ranks).read_bytes())
    hashes = [load_tokenizer(spec).hash for spec in ("bytes", ranks, other, str(tmp_path / "copy.tiktoken"))]
    assert len(set(hashes)) == 3
    assert hashes[1] == hashes[3]


def test_gpt2_if_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Path(__file__).parents[3] / "shared" / "data" / "tiktoken"
    if not cache.is_dir():
        pytest.skip("no copy of GPT-2's ranks")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    import tiktoken

    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    ids = tokenizer.encode_batch(TEXTS)
    assert [i.tolist() for i in ids] == [tiktoken.get_encoding("gpt2").encode_ordinary(t) for t in TEXTS]
    assert [tokenizer.decode(i) for i in ids] == TEXTS
    assert tiktoken.get_encoding("gpt2")._pat_str == PATTERN


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("byte", r"data.tokenizer: 'byte' is unknown.*did you mean 'bytes'"),
        ("{}/smal.tiktoken", r"'.*smal.tiktoken' does not exist; did you mean 'small.tiktoken'"),
    ],
)
def test_unknown(spec: str, says: str, ranks: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        load_tokenizer(spec.format(tmp_path))


@pytest.mark.parametrize(("spoil", "says"), [(b"!? 7\n", "line 263"), (b"QUFB 3\n", "a rank twice")])
def test_damaged_ranks(spoil: bytes, says: str, ranks: str) -> None:
    Path(ranks).write_bytes(Path(ranks).read_bytes() + spoil)
    with pytest.raises(DataError, match=says):
        load_tokenizer(ranks)
    Path(ranks).write_bytes(Path(ranks).read_bytes()[:500])
    with pytest.raises(DataError, match=r"line \d+|no rank for byte"):
        load_tokenizer(ranks)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("a\ud800", r"texts: '\\ud800' at index 1 is half of a surrogate pair"),
        (b"a", "texts: b'a' is a bytes; expected str"),
        (None, "texts: None is a NoneType; expected str"),
    ],
)
def test_what_is_no_text(given: object, says: str, ranks: str) -> None:
    for tokenizer in (load_tokenizer("bytes"), load_tokenizer(ranks)):
        with pytest.raises(ConfigError, match=says):
            tokenizer.encode_batch(["fine", given])  # type: ignore[list-item]
