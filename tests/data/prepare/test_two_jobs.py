"""Two jobs that prepare the same data: one works, the other waits and takes the result."""

import os
import threading
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.manifest import MANIFEST, Manifest
from pipeline.data.prepare import prepare
from pipeline.run import Run
from pipeline.runtime import claims
from tests.support.prepared_text import write_rows
from tests.support.tiny_runs import tiny


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(claims, "POLL_S", 0.05)
    return Run.of(tiny(tmp_path, "a"))


def test_the_second_preparation_waits_for_the_first(run: Run) -> None:
    """The first one is played by this thread, which owns the folder and has written a part of it."""
    path, results = run.data_path, list[Manifest]()
    work = Path(path) / "_work-0123456789abcdef"
    second = threading.Thread(target=lambda: results.append(prepare.ensure(run.config.data, path)))
    with claims.held(path, "data.path", path, "prepared"):
        work.mkdir()
        second.start()
        time.sleep(0.5)
        assert second.is_alive()
        assert sorted(os.listdir(path)) == [claims.FOLDER, work.name]
        manifest = write_rows(run.config)
    second.join(30)
    assert results == [manifest]
    assert not work.exists()
    assert MANIFEST in storage.listing(path)


def test_prepared_data_needs_no_claim(run: Run) -> None:
    """A folder that several jobs read may be one that they cannot write."""
    manifest = write_rows(run.config)
    with claims.held(run.data_path, "data.path", run.data_path, "prepared"):
        assert prepare.ensure(run.config.data, run.data_path) == manifest
