"""Every command in the pages of the root, of docs/ and of cluster/, and in the headers of configs, parses."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import load, parse_section, read_tree
from pipeline.config.schema import ExportConfig, ImportConfig
from pipeline.config.sweep import load_sweep
from pipeline.planning.gpus import select_gpus

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PLANNED = ("pretrain", "distill")  # jobs that take plan=GPU


def pieces(page: str) -> Iterator[str]:
    """Code of a Markdown page: fenced blocks, indented blocks and inline code, continued lines joined."""
    page = re.sub(r"\\\n\s*", "", page)
    fenced = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    for block in fenced.findall(page):
        yield from block.splitlines()
    for line in fenced.sub("", page).splitlines():
        if line.startswith("    "):
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


def header(config: str) -> Iterator[str]:
    """Comment lines of a config, continued lines joined."""
    text = "\n".join(line.lstrip("# ") for line in config.splitlines() if line.startswith("#"))
    return iter(re.sub(r"\\\n\s*", "", text).splitlines())


def expanded(line: str) -> Iterator[str]:
    """The line for every value of its loop `for x in a b; do ...; done`, or the line itself."""
    if loop := re.search(r"for (\w+) in ([^;]+); do (.*?); done", line):
        variable, values, body = loop.groups()
        for value in values.split():
            yield line.replace(loop[0], body.replace(f"${variable}", value))
    else:
        yield line


def commands(pattern: str) -> list[str]:
    """What follows the pattern in all pages and headers, up to the end of the command; each text once."""
    found = {}
    for file in (*PAGES, *CONFIGS):
        text = file.read_text("utf-8")
        for piece in pieces(text) if file.suffix == ".md" else header(text):
            for line in expanded(piece):
                for match in re.finditer(pattern, line):
                    found[match[1].strip()] = file
    return list(found)


JOBS = commands(r"python -m jobs\.((?!NAME)\w+[^;&|]*)")
PYTEST = commands(r"(?<![\w.-])(pytest(?: [\w./:=\"' -]+)?)$")
SCRIPTS = commands(r"python ((?!-)[\w/]+\.py)")


def check_job(job: str, words: list[str]) -> None:
    """Parse the arguments of a job as the job does, without running it."""
    assert importlib.util.find_spec(f"jobs.{job}") is not None, f"no such job: {job}"
    if not words or words[0] == "--help" or re.fullmatch(r"[A-Z]+(\.yaml)?", words[0]):
        return  # a job that is named, not run
    if job == "harness":
        assert words[0].startswith("--")
        return
    if job == "convert":
        keys = {word: word.partition("=")[0].partition(".")[0] for word in words[2:]}
        assert set(keys.values()) <= {*ExportConfig.model_fields, *ImportConfig.model_fields}
        parse_section(
            ExportConfig, {}, "card", [word for word in keys if keys[word] in ExportConfig.model_fields]
        )
        return
    path, overrides = ROOT / words[0], words[1:]
    if job == "sweep":
        load_sweep(path, overrides)
    elif job == "benchmark":
        parse_section(BenchmarkConfig, read_tree(path), str(path), overrides)
    else:
        plans = [word for word in overrides if job in PLANNED and word.startswith("plan=")]
        load(path, [word for word in overrides if word not in plans])
        for plan in plans:
            select_gpus(plan.removeprefix("plan="))


@pytest.mark.parametrize("command", JOBS)
def test_a_command_of_a_job_parses(command: str) -> None:
    job, *words = shlex.split(command, comments=True)
    check_job(job, words)


@pytest.mark.parametrize("command", PYTEST)
def test_a_command_of_pytest_names_what_is_there(command: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in settings["markers"]}
    words = iter(shlex.split(command)[1:])
    for word in words:
        if word == "-m":
            named = re.findall(r"\w+", next(words))
            assert {*named} - {"not", "and", "or"} <= markers
        elif not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), word


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_there(script: str) -> None:
    assert (ROOT / script).is_file()


def test_the_commands_are_found() -> None:
    """Else the tests above would pass by having nothing to check."""
    assert len(JOBS) > len(CONFIGS)
    assert {command.split()[0] for command in JOBS} >= {"pretrain", "distill", "sweep", "sample", "benchmark"}
    for config in CONFIGS:
        name = config.relative_to(ROOT).as_posix()
        assert any(name in command for command in JOBS), f"{name} is in no command"
    assert len(PYTEST) > 2


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("pretrian configs/text/quickstart.yaml", "no such job"),
        ("pretrain configs/text/quikstart.yaml", "did you mean 'quickstart.yaml'"),
        ("pretrain configs/text/quickstart.yaml train.stpes=5", "did you mean 'steps'"),
        ("pretrain configs/text/quickstart.yaml plan=h10", "did you mean 'h100'"),
        ("sweep configs/sweep/quickstart.yaml serch=grid", "serch: no such key"),
        ("benchmark configs/benchmark/tiny.yaml model=3", "did you mean 'models'"),
        ("convert a.ckpt b licence=mit", "licence"),
    ],
)
def test_a_planted_mistake_is_found(command: str, says: str) -> None:
    job, *words = shlex.split(command)
    with pytest.raises((ValueError, AssertionError), match=says):
        check_job(job, words)
