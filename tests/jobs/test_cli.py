"""The command line: the list of jobs, usage, help."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import command
from pipeline.config.schema import RunConfig

ROOT = Path(__file__).parents[2]


def test_the_jobs_are_listed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  jobs.")]
    assert {name for name, _ in lines} >= {
        f"jobs.{name}" for name in ("prepare", "pretrain", "sweep", "convert")
    }
    assert not {"jobs.cli", "jobs.plan"} & {name for name, _ in lines}
    assert all(summary.endswith(".") for _, summary in lines)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_usage_is_printed_once_and_help_lists_the_keys(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    handler = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(SystemExit) as ended:
        command(pytest.fail, "CONFIG.yaml [section.key=value ...]", least=1, config=RunConfig)
    printed = capsys.readouterr().out
    assert ended.value.code == code
    assert printed.count("usage: ") == printed.count("CONFIG.yaml [section.key=value ...]") == 1
    assert ("\ntrain\n  steps " in printed) == (code == 0)
    # Its default would end the process at a broken connection.
    assert signal.getsignal(signal.SIGPIPE) == handler


def test_help_ends_quietly_when_its_reader_does() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    job = [sys.executable, "-m", "jobs.pretrain", "--help"]
    done = subprocess.run(job, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
