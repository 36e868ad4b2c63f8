"""The folder in which Ray keeps its sockets: one that cannot be used is named before Ray starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.runtime.ray_cluster import start


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_one_that_cannot_be_written(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, f"{tmp_path}/file")
    with pytest.raises(
        ConfigError, match=rf"^{variable}: '{tmp_path}/file' is not a folder that can be written"
    ):
        start(address="local")


def test_one_that_is_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    code = f"""
import os
os.environ["TMPDIR"] = {str(long)!r}
from pipeline.runtime.ray_cluster import start
start(address="local", num_cpus=1, include_dashboard=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"ConfigError: TMPDIR: '{long}' is too long for the paths of Ray's sockets" in done.stderr
