"""Prompts and answers as rows: templates, ends of answers, what is cut, and every kind of source."""

import json
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.data import TextDataConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare import exercises, pydoc_questions
from pipeline.data.shards import ShardReader
from pipeline.data.templates import Message, exchange_of, prompt_text
from pipeline.errors import DataError
from pipeline.models.batch import Roles
from tests.support.messy_text import prepare_here

EOT, L, BLOCK = 256, 16, 4
PAIRS = [
    ("ab", "xyz"),
    ("", "q"),
    ("abc", "wxyz"),
    ("a" * 20, "b"),
    ("a", ""),
    ("ab", "y" * 30),
    ("a" * 15, "b"),
]
FIELDS = {"prompt_field": "prompt", "answer_field": "answer"}


def section(source: Path | str, **keys: Any) -> TextDataConfig:
    defaults = {"length": L, "wrap": "sentence", "answer_block": BLOCK, "validation_documents": 1}
    return TextDataConfig(source=str(source), **defaults | FIELDS | keys)


def prepared(data: TextDataConfig, path: Path) -> tuple[Manifest, np.ndarray, Roles]:
    """The manifest, and rows and roles of training, then of validation."""
    manifest, rows, roles = prepare_here(data, path), [], []
    for split in ("train", "validation"):
        reader = ShardReader(str(path), manifest, split)
        every = np.arange(len(reader))
        rows.append(reader.rows(every).astype(int))
        roles.append(reader.roles(every))
    return manifest, np.concatenate(rows), Roles.concatenate(roles)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_of_every_pair(tmp_path: Path) -> None:
    """BOS and prompt are given; the answer goes on with end of text to the end of its block; the rest is padding."""
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS]
    data = section(write_jsonl(tmp_path / "a.jsonl", rows), shard_rows=2)
    manifest, tokens, roles = prepared(data, tmp_path / "data")
    expected = [
        (3, [*b"xyz", EOT]),
        (1, [*b"q", EOT, EOT, EOT]),
        (4, [*b"wxyz", EOT, EOT, EOT, EOT]),
        (3, [*b"y" * 13]),  # cut: no end of text
    ]
    assert roles.given.tolist() == [given for given, _ in expected]
    assert roles.lengths.tolist() == [given + len(targets) for given, targets in expected]
    for row, (given, targets), (prompt, _) in zip(
        tokens.tolist(), expected, [PAIRS[i] for i in (0, 1, 2, 5)], strict=True
    ):
        assert row == [EOT, *prompt.encode(), *targets, *[EOT] * (L - given - len(targets))]
    assert (manifest.rows_cut, manifest.rows_full, manifest.documents_empty) == (1, 2, 1)
    assert (manifest.answer_block, manifest.facts.answer_block, manifest.facts.template) == (4, 4, "plain")


def test_every_source_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": f"answer {i}", "other": i} for i in range(9)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    write_jsonl(tmp_path / "chats.jsonl", chats)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=4)
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "chats.parquet", row_group_size=4)
    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows)
    found = []
    for source in ("pairs.jsonl", "pairs.parquet", "chats.jsonl", "chats.parquet", f"hf:{folder}"):
        keys: dict[str, Any] = {}
        if source.startswith("chats"):
            keys = dict.fromkeys(FIELDS) | {"messages_field": "messages"}
        name = source if source.startswith("hf:") else tmp_path / source
        found.append(prepared(section(name, length=32, **keys), tmp_path / f"data-{len(found)}"))
    for _, tokens, (given, lengths, _) in found[1:]:
        assert np.array_equal(tokens, found[0][1])
        assert np.array_equal(given, found[0][2].given)
        assert np.array_equal(lengths, found[0][2].lengths)


def test_templates() -> None:
    chat = [
        Message("system", "Be brief."),
        Message("user", "Hi {}"),
        Message("assistant", "Yes?"),
        Message("user", "Why?"),
        Message("assistant", "So."),
    ]
    prompt, answer = exchange_of(chat, "chat")
    assert prompt == "System:\nBe brief.\n\nUser:\nHi {}\n\nAssistant:\nYes?\n\nUser:\nWhy?\n\nAssistant:\n"
    assert answer == "So."
    assert prompt_text(chat[1:2], "instruction") == "### Instruction:\nHi {}\n\n### Response:\n"
    assert prompt_text(chat[1:2], "plain") == "Hi {}"


@pytest.mark.parametrize(
    ("row", "keys", "says"),
    [
        (
            {"prompt": "a", "anwser": "b"},
            {},
            "no field 'answer' (data.answer_field); fields: prompt, anwser; did you",
        ),
        ({"prompt": "a", "answer": 3}, {}, "'answer' holds a int; expected text"),
        (["a"], {}, "a list; expected an object with the fields 'prompt' and 'answer'"),
        ({"chat": []}, {"messages_field": "chat"}, "messages: '[]'; expected a list of objects"),
        (
            {"chat": [{"role": "user"}]},
            {"messages_field": "chat"},
            "message 0: \"{'role': 'user'}\"; expected",
        ),
        (
            {"chat": [{"role": "asistant", "content": "a"}]},
            {"messages_field": "chat"},
            "message 0: role 'asistant'; expected system, user, assistant; did you mean 'assistant'?",
        ),
        (
            {"chat": [{"role": "user", "content": "a"}]},
            {"messages_field": "chat"},
            "messages: the last one is of role 'user'; expected the assistant's answer",
        ),
    ],
)
def test_rows_that_are_no_pairs(row: Any, keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    keys = dict.fromkeys(FIELDS) | keys if keys else keys
    with pytest.raises(DataError) as error:
        prepare_here(section(tmp_path / "a.jsonl", **keys), tmp_path / "data")
    assert f"a.jsonl line 1: {says}" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"answer_field": None}, "answer_field null with prompt_field 'prompt'; expected both or neither"),
        ({"messages_field": "m"}, "messages_field 'm' and answer_field 'answer' both say where answers are"),
        ({"wrap": "none"}, "wrap 'none' with prompts and answers, each pair a row; expected sentence"),
        ({"answer_block": 15}, "answer_block 15 for rows of 16 tokens; expected at most 14"),
        (
            dict.fromkeys(FIELDS) | {"template": "chat"},
            "template 'chat' without prompts; expected messages_field",
        ),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        section("a.jsonl", **keys)


def test_exercises_have_right_answers() -> None:
    documents = exercises.documents()
    assert len({document["prompt"] for document in documents}) == len(documents) > 7000
    tasks = []
    for document in documents:
        task, word = document["prompt"].rstrip(":").split()
        assert document["answer"] == {"reverse": word[::-1], "sort": "".join(sorted(word))}[task]
        tasks.append(task)
    assert tasks.count("sort") == len(tasks) // 2


def test_questions_are_answered_by_the_documentation() -> None:
    documents = pydoc_questions.documents()
    assert len({document["prompt"] for document in documents}) == len(documents) > 200
    text = " ".join(" ".join(topic.split()) for topic in topics.values())
    for document in documents:
        assert " ".join(document["answer"].split()) in text
        subject = re.fullmatch(r"Explain: (.*)\n|What does (.*) do\?\n", document["prompt"])
        assert subject
        assert " ".join((subject[1] or subject[2]).split()) in text
    answers = {document["prompt"]: document["answer"] for document in documents}
    assert answers["What does str.isupper() do?\n"].startswith('Return "True" if all cased characters')
    assert answers['Explain: The "assert" statement\n'].startswith("Assert statements are a convenient way")
