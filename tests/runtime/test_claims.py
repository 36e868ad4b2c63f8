"""Claims: one job at a time in a folder, and no dead job in the way of a living one."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.runtime import claims
from tests.support.object_store import Fault, Store
from tests.support.rounds import at_once, claimed

ROOT = Path(__file__).parents[2]
HOLDER = """
import logging, sys, time
from pipeline.runtime import claims
logging.basicConfig()
claims.BEAT_S = float(sys.argv[2])
with claims.held(sys.argv[1], "cluster.storage", "run 'a'", "trained"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(claims, "POLL_S", 0.05)
    if request.param == "local":
        return str(tmp_path / "runs" / "a")
    request.getfixturevalue("store").faults.clear()
    return f"s3://bucket/{uuid.uuid4().hex}/a"


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(claims, "POLL_S", 0.05)
    return str(tmp_path / "a")


def hold(folder: str, wait: bool = False) -> AbstractContextManager[None]:
    return claims.held(folder, "cluster.storage", "run 'a'", "trained", wait)


def holder(folder: str, beat: float = 15.0) -> subprocess.Popen[str]:
    """A process that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder, str(beat)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def plant(folder: str, number: int = 1, **changes: object) -> Path:
    """A claim as another process has left it."""
    mine = claims._process(os.getpid())
    owner = {"host": "far", "pid": os.getpid(), "place": claims._place(), "started": mine}
    owner |= {"since": "yesterday", "verb": "trained", "token": uuid.uuid4().hex, **changes}
    path = storage.join(folder, claims.FOLDER, f"{number:06d}.json")
    storage.publish_text(path, json.dumps(owner))
    return Path(path)


def names(folder: str) -> list[str]:
    return storage.listing(storage.join(folder, claims.FOLDER))


def test_a_second_job_is_refused_and_the_next_one_is_not(folder: str) -> None:
    with hold(folder):
        with pytest.raises(
            ConfigError, match=rf"run 'a' is being trained by .*:{os.getpid()} since 20.* UTC; wait"
        ):
            hold(folder).__enter__()
        assert names(folder) == ["000001.json"]
    assert names(folder) == []
    with hold(folder):
        assert names(folder) == ["000001.json"]


def test_a_job_that_fails_releases_its_claim(folder: str) -> None:
    with pytest.raises(RuntimeError), hold(folder):
        raise RuntimeError
    assert storage.listing(folder) == []


def test_a_claim_that_its_owner_could_not_remove_does_not_block_it(
    local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise OSError(path)

    with monkeypatch.context() as patch, hold(local):
        patch.setattr(storage, "remove", fail)
        (claim,) = (Path(local) / claims.FOLDER).iterdir()
    claim.touch()
    with hold(local):
        assert claim not in (Path(local) / claims.FOLDER).iterdir()


def test_a_job_that_may_wait_gets_its_turn(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []

    def second() -> None:
        with hold(folder, wait=True):
            order.append("second")

    with hold(folder):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.3)
        order.append("first")
    waiting.join(30)
    assert order == ["first", "second"]


def test_processes_that_begin_together_never_hold_together(store: Store, tmp_path: Path) -> None:
    """Each waits for its turn and marks when it came and went; then each tries once, and one succeeds."""
    rounds = [(str(tmp_path / "local"), True), (f"s3://bucket/{uuid.uuid4().hex}", True)]
    rounds += [(str(tmp_path / f"refused-{index}"), False) for index in range(3)]
    for (_, wait), results in zip(rounds, at_once(claimed, rounds, 3), strict=True):
        times = sorted(result for result in results if isinstance(result, tuple))
        assert len(times) == (3 if wait else 1), results
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(times))
        assert all("is being trained by" in result for result in results if isinstance(result, str))


def test_a_dead_owner_of_this_machine_frees_its_claim_at_once(local: str) -> None:
    process = holder(local)
    with pytest.raises(ConfigError, match=f":{process.pid} since"):
        hold(local).__enter__()
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([psutil.Process(process.pid)], timeout=0.5)  # it stays a zombie, which is as dead
    with hold(local):
        assert names(local) == ["000002.json"]
    process.wait()


def test_another_process_with_the_same_pid_is_not_the_owner(local: str) -> None:
    plant(local, started="1")
    with hold(local):
        assert names(local) == ["000002.json"]


@pytest.mark.parametrize("clock", [-1e6, 0.0, 1e6])
def test_an_owner_elsewhere_is_judged_by_the_clock_of_the_store(
    folder: str, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + clock)
    monkeypatch.setattr(claims, "BEAT_S", 0.5)
    plant(folder, place="another boot")
    began = time.monotonic()
    with hold(folder):
        assert time.monotonic() - began > 0.5 * claims.MISSED_BEATS - 1  # the store's times are whole seconds
        assert names(folder) == ["000002.json"]


def test_an_owner_elsewhere_that_renews_its_claim_is_alive(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.5)
    monkeypatch.setattr(claims, "MISSED_BEATS", 10)
    with hold(folder):
        monkeypatch.setattr(claims, "_place", lambda: "another boot")
        with pytest.raises(ConfigError, match="run 'a' is being trained by"):
            hold(folder).__enter__()


def test_an_old_claim_is_taken_over_without_waiting(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "POLL_S", 1e6)
    path = plant(local, place="another boot")
    os.utime(path, (1e9, 1e9))
    path.with_name("000002.json").write_text("")  # its owner died before it could write it
    os.utime(path.with_name("000002.json"), (1e9, 1e9))
    with hold(local):
        assert names(local) == ["000003.json"]


def test_an_owner_that_was_taken_for_dead_ends(local: str) -> None:
    process = holder(local, beat=0.2)
    plant(local, number=2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "another job has taken over" in output
    assert names(local) == ["000002.json"]


def test_a_store_without_conditions(store: Store) -> None:
    """Of two that wrote the same name, the last one owns it."""
    folder = f"s3://bucket/{uuid.uuid4().hex}"
    store.faults[:] = [Fault(r"^PUT .*/000001.json", 501, 1)]
    with hold(folder):
        assert store.faults[0].times == 0
        claim = claims._Claim(
            storage.join(folder, claims.FOLDER), 1, claims.Owner("", 1, "", "", "", "run", "")
        )
        assert claim.lost()


def test_a_folder_that_cannot_be_written(tmp_path: Path, store: Store) -> None:
    (tmp_path / "file").write_text("")
    for folder in (str(tmp_path / "file" / "a"), "s3://no-such-bucket/a"):
        with pytest.raises(
            ConfigError, match=f"cluster.storage: .*{folder}.* cannot be written|not a folder that"
        ):
            hold(folder).__enter__()
