"""Jobs started as a user starts them, watched, and killed in the ways that clusters kill."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

import psutil
import yaml

from pipeline.config.load import dump
from pipeline.config.schema import RunConfig

ROOT = Path(__file__).parents[2]


def job_output(name: str, *words: str, cwd: Path = ROOT, **variables: str) -> str:
    """Run `python -m jobs.NAME WORDS` to its end, which must be a good one.

    Args:
        name: of the job.
        words: config and overrides.
        cwd: folder in which it runs.
        variables: of its environment, beside those of this process without Ray's and MLflow's own.

    Returns:
        Standard output.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *words],
        cwd=cwd,
        env=inherited | variables,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


class LaunchedJob:
    """`python -m jobs.NAME CONFIG` in a session of its own, its output read line by line.

    Args:
        environment: variables beside those of this process, of which Ray's own are left out.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig | Path,
        folder: Path,
        *overrides: str,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        path = config if isinstance(config, Path) else folder / f"{config.name}.yaml"
        if isinstance(config, RunConfig):
            path.write_text(dump(config))
            assert yaml.safe_load(path.read_text())
        self.lines: list[str] = []
        self.times: list[float] = []  # when each came, by time.monotonic()
        self._news = threading.Condition()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", f"jobs.{name}", str(path), *overrides],
            cwd=ROOT,
            env={**inherited, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip())
                self.times.append(time.monotonic())
                self._news.notify_all()

    def wait_for(self, pattern: str, timeout: float = 300, after: int = 0) -> re.Match[str]:
        """The first line from number `after` on that matches."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for line in self.lines[after:]:
                    if match := re.search(pattern, line):
                        return match
                ended = self.process.poll() is not None and not self._reader.is_alive()
                if ended or time.monotonic() > deadline:
                    raise AssertionError(f"no line {pattern!r} in:\n" + "\n".join(self.lines[-60:]))
                self._news.wait(0.2)

    def workers(self) -> list[psutil.Process]:
        """Processes of Ray Train's workers, by age."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [c for c in children if c.is_running() and "RayTrainWorker" in " ".join(_command(c))]
        return sorted(found, key=lambda process: process.create_time())

    def finish(self, timeout: float = 480) -> str:
        """Wait for a good end; the output."""
        code = self.process.wait(timeout)
        self._reader.join(10)
        text = "\n".join(self.lines)
        assert code == 0, text[-6000:]
        return text

    def kill_driver(self) -> None:
        """SIGKILL to the driver alone, as an out-of-memory killer does; then to what it leaves behind."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        time.sleep(2)
        for child in children:
            if child.is_running():
                child.kill()
        psutil.wait_procs(children, timeout=30)

    def kill_all(self) -> None:
        """Leave nothing running."""
        if self.process.poll() is None:
            self.kill_driver()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
