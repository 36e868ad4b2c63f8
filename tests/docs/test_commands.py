"""Every command in README and documentation parses: its config, its overrides, its files."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import load, parse_section, read_tree
from pipeline.config.sweep import load_sweep
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster/README.md"]
# At the beginning of a line, behind `&&`, or behind the `--` of `ray job submit`.
COMMAND = re.compile(r"^ *(?:.* (?:--|&&) )?(?:\.venv/bin/)?(python -m jobs\..*|pytest .*)$", re.MULTILINE)
RUNS = ("prepare", "pretrain", "distill", "sample", "evaluate")


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line that is a command, comments cut off."""
    return [
        (page.relative_to(ROOT).as_posix(), re.sub(r"\s+#.*", "", command))
        for page in PAGES
        for command in COMMAND.findall(page.read_text(encoding="utf-8").replace("\\\n", " "))
    ]


def check(command: str) -> None:
    """Parse a command as its program would, without running it."""
    program, *words = shlex.split(command)
    if program == "pytest":
        files = [word for word in words if word.endswith(".py")]
        assert [name for name in files if not (ROOT / name).is_file()] == []
        return
    job = words[1].removeprefix("jobs.")
    assert (ROOT / f"jobs/{job}.py").is_file()
    source, *overrides = words[2:]
    if job in RUNS:
        load(ROOT / source, [word for word in overrides if not word.startswith("plan=")])
    elif job == "sweep":
        load_sweep(ROOT / source, overrides)
    elif job == "benchmark":
        parse_section(BenchmarkConfig, read_tree(ROOT / source), source, overrides)
    elif job == "harness":
        assert {"--model", "--model_args", "--tasks"} <= {source, *overrides}
    else:
        assert job == "convert"
        assert all("=" in word for word in overrides[1:])


def test_there_are_commands() -> None:
    assert len({page for page, _ in commands()}) > 5


@pytest.mark.parametrize(("page", "command"), commands())
def test_the_command_parses(page: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "python -m jobs.pretrain configs/text/none.yaml",
        "python -m jobs.pretrain configs/text/quickstart.yaml train.stepss=5",
        "python -m jobs.sweep configs/sweep/quickstart.yaml serch=grid",
        "pytest tests/none.py",
    ],
)
def test_a_wrong_command_is_caught(command: str) -> None:
    with pytest.raises((ConfigError, AssertionError)):
        check(command)
