"""Requests to a store that checkpoints take, however many workers write them."""

import hashlib
import json
import uuid
from pathlib import Path

import pytest
import torch
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from safetensors.torch import save

from pipeline import storage
from pipeline.storage import files
from pipeline.training import checkpoint, slices
from pipeline.training.resume import _writer_of, needed_by
from pipeline.training.slices import index_of
from tests.support.object_store import Store

PAGE = 1000  # names in a listing, and in a removal
VALUES = 50  # of a rank, in one weight


def files_of(rank: int) -> dict[str, bytes]:
    """What a rank writes at ZeRO stage 1, but for the list of its files."""
    part = torch.arange(rank * VALUES, (rank + 1) * VALUES, dtype=torch.float32)
    return {
        f"{stem}_{rank:05d}.safetensors": save({f"{kind}weight@{rank * VALUES}": part})
        for stem, kind in (("optimizer", "weight:"), ("ema", ""))
    }


def publish(
    folder: str, step: int, workers: int, lists: bool = True
) -> tuple[checkpoint.TrainState, checkpoint.Files]:
    """Put a checkpoint into the store of the tests, past its protocol, and return what rank 0 knows of it."""
    state = {"step": step, "epoch": 0, "workers": workers, "config": {}, "run_id": None, "samples": []}
    contents = {name: data for rank in range(workers) for name, data in files_of(rank).items()}
    contents["state.json"] = json.dumps(state).encode()
    facts = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
    slices = index_of([[("weight", rank * VALUES, VALUES)] for rank in range(workers)])
    first = {"workers": workers, "step": step, "files": {}, "others": facts, "slices": slices}
    contents |= {f"files_{rank:05d}.json": b"{}" for rank in range(1, workers if lists else 1)}
    contents["files_00000.json"] = json.dumps(first).encode()
    backend, prefix = s3_backends[DEFAULT_ACCOUNT_ID]["aws"], folder.removeprefix("s3://bucket/")
    for name, data in contents.items():
        backend.put_object("bucket", f"{prefix}/step_{step:08d}/{name}", data)
    return checkpoint.TrainState(**{**state, "samples": ()}), facts


def resume_on(path: str, rank: int, workers: int) -> None:
    """What a rank does to resume, as `agree` and `Resume.load`: compare a share of the files, and read its slices."""
    files, _ = checkpoint.promised(path)
    own = {name: facts for name, facts in files.items() if (_writer_of(name) or 0) % workers == rank}
    assert checkpoint.damages(path, own) == []
    index = checkpoint.slices_of(path)
    assert index is not None
    count = VALUES * sum(len(parts) for parts in index.values()) // workers
    wanted = {("weight", rank * count): torch.zeros(count)}
    writer = slices.writer(index, wanted)
    source = path if writer is None else str(storage.fetch(path, needed_by(writer)))
    slices.read(source, "optimizer", index, {"weight:": wanted})
    slices.read(source, "ema", index, {"": wanted})
    assert torch.equal(wanted["weight", rank * count], torch.arange(count) + float(rank * count))


@pytest.mark.parametrize("workers", [1, 16, 64, pytest.param(1000, marks=pytest.mark.slow)])
def test_calls_do_not_grow_with_the_workers(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """But for the pages of 1,000 names in which a store lists and removes."""
    folder = f"s3://bucket/{uuid.uuid4().hex}"
    pages = -(-(3 * workers + 1) // PAGE)

    def calls() -> int:
        count = len(store.requests)
        store.requests.clear()
        return count

    pruner = checkpoint.Pruner(folder, keep=1)
    pruner.prune()  # looks at an empty folder
    pruned = []
    for step in (10, 20, 30):
        state, facts = publish(folder, step, workers)
        calls()
        pruner.written(state, facts)
        pruner.prune()
        pruned.append(calls())
        assert checkpoint.steps(folder) == [step]
    if workers > 1:
        pruner.written(*publish(folder, 40, workers, lists=False))
        pruner.prune()
        assert checkpoint.steps(folder) == [30, 40], "one that is not complete replaces none"
        checkpoint.remove_after(folder, 30)
    calls()
    path = f"{folder}/step_00000030"
    monkeypatch.setattr(files, "node_folder", lambda: tmp_path / "driver")
    assert checkpoint.newest(folder) == path
    newest = calls()
    resumed = {}
    for group in {workers, max(1, workers // 2)}:  # as many as wrote it, and half of them
        for rank in {0, group // 2, group - 1}:
            monkeypatch.setattr(files, "node_folder", lambda node=f"{group}-{rank}": tmp_path / node)
            resume_on(path, rank, group)
            resumed[group, rank] = calls()
    print(
        f"\n{workers:5} workers: prune {pruned[-1]}, newest {newest}, resume {max(resumed.values())} requests"
    )
    assert pruned == [pages, *[3 * pages] * 2]
    assert newest == 7 + 2 * pages
    assert max(resumed.values()) <= 30 + 3 * pages
