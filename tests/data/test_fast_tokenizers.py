"""Tokenizers of the Hugging Face library: special ids, plain text, folders, the hub's cache, training."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from huggingface_hub import constants

from pipeline.data.tokenizers import END_OF_TEXT, load_tokenizer, train_bpe
from pipeline.errors import ConfigError, DataError
from tests.support.messy_text import WORDS, messy_lines, word_piece_vocabulary

MESSY = messy_lines(300, seed=1)


@pytest.fixture
def word_piece(tmp_path: Path) -> Path:
    """A folder with the vocabulary of a WordPiece tokenizer, as the models of BERT have it."""
    folder = tmp_path / "bert-tiny"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(word_piece_vocabulary()) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a word-level tokenizer.json with some added tokens, and files beside it."""

    def write(*added: str, special: bool = True, **beside: object) -> Path:
        library = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({"[UNK]": 0, "cat": 1, "stop": 2}, "[UNK]")
        )
        library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        library.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in added])
        library.enable_truncation(3)
        library.enable_padding(length=3)
        library.save(str(tmp_path / "tokenizer.json"))
        for name, tree in beside.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(tree))
        return tmp_path

    return write


def test_word_piece_is_that_of_the_library(word_piece: Path) -> None:
    tokenizer = load_tokenizer(str(word_piece))
    assert (tokenizer.name, tokenizer.vocab_size) == ("bert-tiny", 200)
    assert (tokenizer.bos, tokenizer.eot, tokenizer.pad) == (2, 3, 0)
    reference = tokenizers.BertWordPieceTokenizer(str(word_piece / "vocab.txt"), lowercase=True)
    reference._tokenizer.encode_special_tokens = True
    expected = [reference.encode(text, add_special_tokens=False).ids for text in MESSY]
    ids = tokenizer.encode_batch(MESSY)
    assert [i.tolist() for i in ids] == expected
    assert not {0, 2, 3} & {i for text in ids for i in text.tolist()}  # "[SEP]" is plain text
    assert tokenizer.decode([2, *tokenizer.encode("The cat sat on a mat."), 3, 0, 0]) == (
        "the cat sat on a mat." + END_OF_TEXT
    )
    (word_piece / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = load_tokenizer(str(word_piece))
    assert cased.hash != tokenizer.hash
    assert cased.encode("Cat").tolist() == [1]


def test_saved_folders_and_other_ways_to_name_one(word_piece: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(word_piece))
    tokenizer.save(tmp_path / "saved")
    named = [str(tmp_path / "saved"), f"hf:{word_piece}", str(tmp_path / "saved" / "tokenizer.json")]
    for other in map(load_tokenizer, named):
        assert other.hash == tokenizer.hash
        assert (other.bos, other.eot, other.pad) == (2, 3, 0)
        assert [i.tolist() for i in other.encode_batch(MESSY)] == [
            i.tolist() for i in tokenizer.encode_batch(MESSY)
        ]
    assert load_tokenizer(named[0]).name == "bert-tiny"


@pytest.mark.parametrize(
    ("added", "beside", "expected"),
    [
        (["<|endoftext|>"], {}, (3, None, None)),
        (["<s>", "</s>", "<pad>"], {}, (4, 3, 5)),
        (["[CLS]", "[SEP]", "[PAD]", "[EOS]"], {}, (6, 3, 5)),
        (["<a>", "<b>", "<c>"], {"tokenizer_config": {"eos_token": "<b>", "pad_token": "<c>"}}, (4, None, 5)),
        (["<a>", "</s>"], {"tokenizer_config": {"sep_token": {"content": "<a>"}}}, (3, None, None)),
        (["<a>"], {"special_tokens_map": {"eos_token": "<a>", "bos_token": "<a>"}}, (3, None, None)),
    ],
)
def test_special_tokens_are_found(
    added: list[str], beside: dict[str, Any], expected: tuple[int | None, ...], write: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(str(write(*added, **beside)))
    assert (tokenizer.eot, tokenizer.bos, tokenizer.pad) == expected
    assert tokenizer.encode("cat cat cat cat cat").tolist() == [1] * 5  # neither cut nor padded
    assert tokenizer.eot not in tokenizer.encode(" ".join(added)).tolist()


def test_a_token_that_the_file_does_not_call_special_is_plain_text_too(write: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(str(write("</s>", special=False)))
    assert 3 not in tokenizer.encode("cat </s> cat").tolist()


def test_a_word_that_is_the_end_of_text(write: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(str(write(tokenizer_config={"eos_token": "stop"})))
    assert tokenizer.eot == 2
    with pytest.raises(DataError, match=r"the text has the word 'stop', which tokenizer .* uses as eot"):
        tokenizer.encode("cat stop")


def test_hash_follows_what_determines_the_ids(word_piece: Path) -> None:
    load_tokenizer(str(word_piece)).save(word_piece)
    path = word_piece / "tokenizer.json"
    tree = json.loads(path.read_text())
    hashes = [load_tokenizer(str(path)).hash]
    for change in (
        {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}},
        {"post_processor": None},
        {"decoder": None},
        {"normalizer": None},
        {"model": {**tree["model"], "max_input_chars_per_word": 7}},
    ):
        path.write_text(json.dumps(tree | change))
        hashes.append(load_tokenizer(str(path)).hash)
    assert hashes[0] == hashes[1] == hashes[2] == hashes[3]
    assert len({hashes[0], *hashes[4:]}) == 3


def test_merges_of_older_versions_are_the_same(tmp_path: Path) -> None:
    train_bpe(270, WORDS * 3).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["merges"] = [" ".join(merge) for merge in tree["model"]["merges"]]
    path.write_text(json.dumps(tree))
    assert load_tokenizer(str(tmp_path)).hash == load_tokenizer(str(path)).hash


def test_trained_bpe() -> None:
    tokenizer = train_bpe(400, MESSY)
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.bos, tokenizer.pad) == (400, 399, None, None)
    shuffled = random.Random(0).sample(MESSY, len(MESSY))
    assert train_bpe(400, shuffled).hash == tokenizer.hash
    other = messy_lines(300, seed=2)
    ids = tokenizer.encode_batch(other)
    assert [tokenizer.decode(i) for i in ids] == other
    assert all(i.max(initial=0) < 399 for i in ids)
    assert sum(map(len, ids)) < 0.8 * sum(len(text.encode()) for text in other)
    assert tokenizer.decode([*tokenizer.encode("the"), 399]) == "the<|endoftext|>"


def test_bpe_of_little_text_keeps_its_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_bpe(300, ["abab abab"]).save(tmp_path)
    assert "bpe:300 has only 259 entries, since the text is short" in caplog.text
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eot) == (300, 299)
    assert len(tokenizer.encode("abab")) == 1
    text = "abab<|endoftext|> \U0001f600"
    assert tokenizer.decode([270, *tokenizer.encode(text), 299, 298]) == text + END_OF_TEXT


def test_hub_from_its_cache_and_without_a_network(
    word_piece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--someone--bert-tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    (cached / "snapshots").mkdir()
    load_tokenizer(str(word_piece)).save(word_piece)
    (word_piece / "tokenizer_info.json").unlink()
    word_piece.rename(cached / "snapshots" / ("a" * 40))
    for spec in ("hf:someone/bert-tiny", f"hf:someone/bert-tiny@{'a' * 40}"):
        assert load_tokenizer(spec).vocab_size == 200
    with pytest.raises(ConfigError) as refused:
        load_tokenizer("hf:bert-base-uncased")
    says = str(refused.value)
    assert "'hf:bert-base-uncased' could not be downloaded (LocalEntryNotFoundError)" in says
    assert (
        "https://huggingface.co/bert-base-uncased/tree/main into a folder, and set data.tokenizer to" in says
    )


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer.json": "{"}, "tokenizer.json of .* is damaged: JSONDecodeError"),
        ({"tokenizer.json": "[]"}, "holds a list; expected an object"),
        ({"tokenizer.json": "{}"}, "is damaged, or not a tokenizer of the Hugging Face library"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "is damaged, or not a tokenizer"),
        ({"vocab.txt": "a\nb"}, "has no end-of-text token.*expected one of .*</s>.*tokenizer_config.json"),
        ({"vocab.txt": ""}, "has no end-of-text token|is damaged"),
        ({"tokenizer_info.json": '{"kind": "fast"}'}, "tokenizer_info.json: damaged"),
        ({"tokenizer_info.json": '{"kind": "fats"}'}, "kind 'fats'; expected .*did you mean 'fast'"),
        ({"other.txt": ""}, "is unknown; expected one of 'bytes', 'text8'"),
    ],
)
def test_damaged_files(files: dict[str, str], says: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises((ConfigError, DataError), match=says):
        load_tokenizer(str(tmp_path))


def test_a_file_that_is_not_there(word_piece: Path) -> None:
    load_tokenizer(str(word_piece)).save(word_piece)
    with pytest.raises(ConfigError, match=r"tokeniser.json' does not exist; did you mean 'tokenizer.json'"):
        load_tokenizer(str(word_piece / "tokeniser.json"))
    with pytest.raises(ConfigError, match=r"'hf:.*' has neither tokenizer.json nor vocab.txt"):
        load_tokenizer(f"hf:{word_piece.parent}")
    with pytest.raises(ConfigError, match="'bpe:300' is trained on the training documents"):
        load_tokenizer("bpe:300")
