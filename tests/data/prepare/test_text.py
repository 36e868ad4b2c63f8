"""Text preparation on Ray: the same bytes however it is run or killed, and text back from shards."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import yaml

from pipeline.config.load import parse
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest, SpecialIds
from pipeline.data.prepare import text_sources
from pipeline.data.prepare.text import tokenise_unit
from pipeline.data.prepare.text_sources import open_source, read
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import ConfigError, DataError
from tests.support.data_helpers import (
    DOCUMENTS,
    ROOT,
    data_path,
    ensure,
    lines,
    prepare,
    run_until,
    shard_bytes,
    write_parquet,
    write_ranks,
    write_sentences,
)
from tests.support.in_process import run_job
from tests.support.messy_text import messy_lines, prepare_here


def make_tree(storage: Path, **data: object) -> dict[str, object]:
    data = {"length": 64, "validation_documents": 8, "shard_rows": 2048, **data}
    return {
        "name": "t",
        "data": data,
        "train": {"batch": 8},
        "sampling": {"steps": 1},
        "cluster": {"storage": str(storage)},
    }


def make_config(storage: Path, **data: object) -> RunConfig:
    return parse(make_tree(storage, **data), "test")


def all_rows(config: RunConfig, manifest: Manifest, split: str) -> np.ndarray:
    reader = ShardReader(data_path(config), manifest, split)
    return reader.rows(np.arange(len(reader)))


@pytest.mark.parametrize("wrap", ["none", "bos_eos"])
def test_pydoc_goes_in_and_comes_back(wrap: str, ray_cluster: None, tmp_path: Path) -> None:
    config = make_config(tmp_path, wrap=wrap)
    manifest = ensure(config)
    assert sum(split.tokens_dropped for split in manifest.splits.values()) < 1e-3 * manifest.tokens

    (unit,) = open_source(config.data).units
    documents = [str(document) for document in read(unit[0], config.data)]
    tokenizer = load_tokenizer("bytes")
    texts = {"train": documents[:-8], "validation": documents[-8:]}
    for split, expected in texts.items():
        rows = all_rows(config, manifest, split)
        assert rows.shape == (manifest.rows(split), 64)
        assert manifest.splits[split].documents == len(expected)
        if wrap == "bos_eos":
            assert (rows[:, [0, -1]] == tokenizer.eot).all()
            rows = rows[:, 1:-1]
        text = "".join(document + "<|endoftext|>" for document in expected)
        dropped = manifest.splits[split].tokens_dropped
        assert dropped < rows.shape[1]
        back = tokenizer.decode(rows.reshape(-1))
        assert text.startswith(back.rstrip("�"))
        assert len(rows.reshape(-1)) + dropped == sum(len(d.encode()) + 1 for d in expected)
    assert not [name for name in os.listdir(data_path(config)) if name.startswith((".", "_"))]

    times = {p.name: p.stat().st_mtime_ns for p in Path(data_path(config)).iterdir()}
    assert ensure(config) == prepare(config) == manifest
    assert times == {p.name: p.stat().st_mtime_ns for p in Path(data_path(config)).iterdir()}


def test_a_row_of_every_sentence(ray_cluster: None, tmp_path: Path) -> None:
    """BOS, the sentence cut to L - 2 tokens, EOT, padding; the same shards for any size of units and shards."""
    texts = write_sentences(tmp_path / "a.jsonl", 100)
    (tmp_path / "many").mkdir()
    for i, text in enumerate(["", *texts, ""]):
        (tmp_path / "many" / f"{i:03d}.txt").write_text(text)
    manifests, rows = [], []
    for source in ("a.jsonl", "many"):
        config = make_config(
            tmp_path,
            source=str(tmp_path / source),
            wrap="sentence",
            length=40,
            validation_documents=30,
            shard_rows=16,
        )
        manifests.append(ensure(config))
        rows.append({split: all_rows(config, manifests[-1], split) for split in ("train", "validation")})
        reader = ShardReader(data_path(config), manifests[-1], "train")
        roles = reader.roles(np.arange(len(reader)))
        assert roles is not None
        given, lengths, _ = roles
        assert not given.any()
        expected = [min(len(text.encode()), 38) + 2 for text in texts[:70]]
        assert lengths.tolist() == expected
        assert manifests[-1].splits["train"].tokens == sum(expected)
        assert manifests[-1].splits["train"].row_lengths == tuple(np.bincount(expected))
    for split, kept in (("train", texts[:70]), ("validation", texts[70:])):
        assert (rows[0][split] == rows[1][split]).all()
        for row, text in zip(rows[0][split], kept, strict=True):
            ids = list(text.encode())[:38]
            assert row.tolist() == [
                256,
                *ids,
                *[256] * (39 - len(ids)),
            ]  # bytes have one special id for all three
    assert manifests[0].special == SpecialIds(eot=256, bos=256, pad=256)
    assert min(lengths) < 20 < 40 == max(lengths)


def test_every_kind_of_source_gives_the_same_shards(ray_cluster: None, tmp_path: Path) -> None:
    """Plain text, .jsonl.zst, and Parquet in the layout of the OpenWebText hub dataset."""
    documents = [d * 20 for d in DOCUMENTS]
    (tmp_path / "txt").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "txt" / f"{i:03d}.txt").write_bytes(document.encode())
    (tmp_path / "a.jsonl.zst").write_bytes(pa.compress(lines(documents), "zstd", asbytes=True))
    hub = tmp_path / "openwebtext"
    write_parquet(hub / "plain_text" / "train-00000-of-00002.parquet", documents[:23])
    write_parquet(hub / "plain_text" / "train-00001-of-00002.parquet", documents[23:])
    ranks = write_ranks(tmp_path / "small.tiktoken")
    seen = []
    for source in (str(tmp_path / "txt"), str(tmp_path / "a.jsonl.zst"), f"hf:{hub}"):
        config = make_config(tmp_path / "runs", source=source, tokenizer=ranks, shard_rows=100)
        manifest = prepare(config)
        assert manifest.source.name == source
        seen.append(shard_bytes(data_path(config)))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) > 2


def test_trained_tokenizer_and_ids_are_the_same_for_two_workers(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(messy_lines(600)))
    monkeypatch.setattr(text_sources, "UNIT_BYTES", 10_000)
    config = make_config(tmp_path, source=str(tmp_path / "a.jsonl"), tokenizer="bpe:300", shard_rows=50)
    manifest = prepare(config)
    monkeypatch.undo()
    assert prepare_here(config.data, tmp_path / "here") == manifest  # type: ignore[arg-type]
    assert shard_bytes(str(tmp_path / "here")) == shard_bytes(data_path(config))
    saved = [load_tokenizer(f"{folder}/tokenizer") for folder in (tmp_path / "here", data_path(config))]
    assert {tokenizer.hash for tokenizer in saved} == {manifest.tokenizer.hash}


def corpus(folder: Path) -> None:
    """40 units of 64 files, some documents empty, some long."""
    folder.mkdir()
    for i in range(40 * 64):
        text = "" if i % 97 == 0 else f"{i} " + f"word{i % 13} " * (i % 100)
        (folder / f"{i:05d}.txt").write_text(text)


@pytest.mark.slow
def test_killed_twice_and_finished_gives_the_same_bytes(
    ray_cluster: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    corpus(tmp_path / "corpus")
    settings = {"source": str(tmp_path / "corpus"), "shard_rows": 100, "validation_documents": 100}
    tree = make_tree(tmp_path / "killed", **settings)
    config, file = parse(tree, "test"), tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    folder = Path(data_path(config))

    one_worker = (
        "import ray; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "from jobs import prepare; from jobs.cli import main; main(prepare.run)"
    )
    straight = tmp_path / "straight"
    command = [sys.executable, "-c", one_worker, str(file), f"cluster.storage={straight}"]
    undisturbed = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": "local"})
    request.addfinalizer(undisturbed.kill)

    def units() -> list[Path]:
        return list(folder.glob("_work-*/unit-*.json"))

    def shards() -> list[Path]:
        return list(folder.glob("train-*.parquet"))

    run_until(file, "local", lambda: len(units()) >= 3)
    assert len(units()) < 40, "killed too late to show anything"
    assert not shards()
    cluster = ray.get_runtime_context().gcs_address
    run_until(file, cluster, lambda: len(shards()) >= 3)
    assert len(units()) == 40
    assert not (folder / "manifest.json").exists()
    there = {path: path.stat().st_mtime_ns for path in shards()}
    time.sleep(0.5)  # workers of the killed job notice and end
    manifest = prepare(config)
    kept = sum(path.stat().st_mtime_ns == when for path, when in there.items())
    assert kept >= len(there) - 2  # finished ones are not written again (two might have lacked their record)

    assert undisturbed.wait(timeout=120) == 0
    other = make_config(straight, **settings)
    assert Manifest.read(data_path(other)) == manifest
    assert shard_bytes(data_path(other)) == shard_bytes(str(folder))
    assert sorted(os.listdir(data_path(other))) == sorted(os.listdir(folder))
    assert len(shard_bytes(str(folder))) > 20
    assert manifest.documents_empty == 27
    assert sum(s.tokens_dropped for s in manifest.splits.values()) < 1e-3 * manifest.tokens


def test_unreadable_documents_are_fatal_or_counted(ray_cluster: None, tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "a.jsonl").write_bytes(lines([d * 9 for d in DOCUMENTS]))
    (source / "b.txt").write_bytes(b"not UTF-8: \xff")
    config = make_config(tmp_path / "runs", source=str(source))
    with pytest.raises(DataError, match=r"b.txt: not UTF-8.*data.on_error: skip"):
        prepare(config)
    assert not [n for n in os.listdir(data_path(config)) if not n.startswith("_work-")]
    manifest = prepare(make_config(tmp_path / "runs", source=str(source), on_error="skip"))
    assert manifest.documents == 40
    assert manifest.skipped.count == 1
    assert "b.txt: not UTF-8" in manifest.skipped.names[0]


def test_empty_corpus_and_too_few_documents(ray_cluster: None, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": ""}) + "\n\n")
    with pytest.raises(DataError, match=r"data.source: .*a.jsonl' is empty"):
        prepare(make_config(tmp_path / "runs", source=str(source)))
    with pytest.raises(DataError, match=r"validation_documents: 80 of 79 documents"):
        prepare(make_config(tmp_path / "runs", validation_documents=80))
    assert not list((tmp_path / "runs").rglob("*.parquet"))
    assert not list((tmp_path / "runs").rglob("manifest.json"))


def test_a_full_temporary_folder_is_named(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; Ray is not needed."""
    source = tmp_path / "a.txt"
    source.write_text("x" * 100_000)
    config = make_config(tmp_path, source=str(source))
    (unit,) = open_source(config.data).units
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DataError, match=r"^TMPDIR: '/.*' cannot hold temporary files: File too large$"):
            tokenise_unit((0, unit), config.data, str(tmp_path / "work"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "work").exists()


def test_a_temporary_folder_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/gone")
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/gone")
    config = make_config(tmp_path)
    (unit,) = open_source(config.data).units
    with pytest.raises(
        DataError, match=rf"^TMPDIR: '{tmp_path}/gone' cannot hold temporary files: No such file"
    ):
        tokenise_unit((0, unit), config.data, str(tmp_path / "work"))


def test_refusals_before_any_work(tmp_path: Path) -> None:
    """None of these starts Ray."""
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"cluster.storage: '.*file/data.*' is not a folder that can be written"
    ):
        prepare(make_config(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"data.path: '.*file/x' is not a folder"):
        prepare(make_config(tmp_path, path=str(tmp_path / "file" / "x")))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds other files, such as 'thesis.tex'"):
        prepare(make_config(tmp_path, path=str(mine)))
    assert os.listdir(mine) == ["thesis.tex"]


def test_other_data_and_changed_sources_are_refused(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, path = tmp_path / "a.jsonl", str(tmp_path / "out")
    source.write_bytes(lines([d * 9 for d in DOCUMENTS]))
    config = make_config(tmp_path, source=str(source), path=path)
    manifest = prepare(config)
    with pytest.raises(DataError, match=r"data.length: the data has 64, the config 32") as caught:
        ensure(make_config(tmp_path, source=str(source), path=path, length=32, wrap="bos_eos"))
    assert "data.wrap: the data has 'none', the config 'bos_eos'" in str(caught.value)
    source.write_bytes(lines([d * 9 for d in DOCUMENTS] + ["more"]))
    with caplog.at_level("WARNING"):
        assert ensure(config) == manifest  # a run that goes on keeps its data
    assert "a.jsonl has changed since" in caplog.text
    with pytest.raises(DataError, match=r"is not what it was when .*out was prepared"):
        prepare(config)


def test_a_file_that_cannot_be_written(ray_cluster: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = make_config(tmp_path, path=str(out))
    (out / "_work-of-a-killed-run").mkdir(parents=True)
    (out / "train-00000.parquet").mkdir()  # in the way
    with pytest.raises(DataError, match=r"train-00000.parquet: cannot be written: Is a directory") as caught:
        prepare(config)
    assert "Traceback" not in str(caught.value)
    (unit,) = out.glob("_work-*/unit-*.json")
    unit.unlink()
    unit.with_suffix(".bin").unlink()
    unit.with_suffix(".bin").mkdir()
    with pytest.raises(DataError, match=r"unit-000000.bin: cannot be written: Is a directory") as caught:
        prepare(config)
    assert "Traceback" not in str(caught.value)
    assert not (out / "manifest.json").exists()
    unit.with_suffix(".bin").rmdir()
    (out / "train-00000.parquet").rmdir()
    prepare(config)
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".parquet") == ["manifest.json", "tokenizer"]


def test_names_follow_contents(tmp_path: Path) -> None:
    base = data_path(make_config(tmp_path))
    assert base == data_path(make_config(tmp_path, streams=4, shuffle_window=7))
    others = [
        {"length": 32},
        {"wrap": "bos_eos"},
        {"shard_rows": 7},
        {"source": "x.txt"},
        {"on_error": "skip"},
    ]
    names = {data_path(make_config(tmp_path, **other)) for other in others}
    assert len(names | {base}) == len(others) + 1
    assert Path(base).name.startswith("pydoc-bytes-64-")
    assert Path(base).parent == tmp_path / "data"
    assert data_path(make_config(tmp_path, path="memory://x/y")) == "memory://x/y"


def test_the_job_tells_mistakes_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(make_tree(tmp_path)))
    done = run_job("prepare", str(file), "data.source=pydok")
    assert done.code == 1
    assert done.stderr == "error: data.source: nothing at 'pydok'; did you mean 'pydoc'?\n"
