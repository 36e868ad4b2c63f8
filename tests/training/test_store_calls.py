"""Requests to a store that checkpoints take, however many workers write them."""

import hashlib
import json
import uuid
from pathlib import Path

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from pipeline.storage import files
from pipeline.training import checkpoint
from tests.support.object_store import Store

DIGEST = hashlib.sha256(b"x").hexdigest()
PAGE = 1000  # names in a listing, and in a removal


def names_of(rank: int) -> list[str]:
    """What a rank writes at ZeRO stage 1, but for the list of its files."""
    own = [f"zero/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", f"ema_{rank:05d}.safetensors"]
    return own + (["zero/mp_rank_00_model_states.pt"] if rank == 0 else [])


def publish(
    folder: str, step: int, workers: int, lists: bool = True
) -> tuple[checkpoint.TrainState, checkpoint.Files]:
    """Put a checkpoint into the store of the tests, past its protocol, and return what rank 0 knows of it."""
    state = {"step": step, "epoch": 0, "workers": workers, "config": {}, "run_id": None, "samples": []}
    text = json.dumps(state).encode()
    facts = {name: (1, DIGEST) for rank in range(workers) for name in names_of(rank)}
    facts["state.json"] = (len(text), hashlib.sha256(text).hexdigest())
    others = {name: fact for name, fact in facts.items() if name not in (*names_of(0), "state.json")}
    own = {name: fact for name, fact in facts.items() if name not in others}
    first = {"workers": workers, "step": step, "files": own, "others": others}
    contents = dict.fromkeys(facts, b"x") | {"state.json": text}
    contents |= {f"files_{rank:05d}.json": b"{}" for rank in range(1, workers if lists else 1)}
    contents["files_00000.json"] = json.dumps(first).encode()
    backend, prefix = s3_backends[DEFAULT_ACCOUNT_ID]["aws"], folder.removeprefix("s3://bucket/")
    for name, data in contents.items():
        backend.put_object("bucket", f"{prefix}/step_{step:08d}/{name}", data)
    return checkpoint.TrainState(**{**state, "samples": ()}), facts


@pytest.mark.parametrize("workers", [1, 16, 64, 1000])
def test_calls_do_not_grow_with_the_workers(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """But for the pages of 1,000 names in which a store lists and removes."""
    monkeypatch.setattr(files, "node_folder", lambda: tmp_path / "node")
    folder = f"s3://bucket/{uuid.uuid4().hex}"
    pages = -(-(3 * workers + 2) // PAGE)

    def calls() -> int:
        count = len(store.requests)
        store.requests.clear()
        return count

    calls()
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
    state, facts = publish(folder, 40, workers, lists=False)
    pruner.written(state, facts)
    pruner.prune()
    assert checkpoint.steps(folder) == [30, 40], "one that is not complete replaces none"
    checkpoint.remove_after(folder, 30)
    calls()
    assert checkpoint.newest(folder) == f"{folder}/step_00000030"
    newest = calls()
    print(f"\n{workers:5} workers: prune {pruned[-1]}, newest {newest} requests; {pages} pages of names")
    assert pruned == [pages, *[3 * pages] * 2]
    assert newest == 7 + 2 * pages
