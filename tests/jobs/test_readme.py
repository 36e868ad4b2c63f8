"""The README's commands do what the README says."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.launched import job_output
from tests.support.notebooks import run_notebook

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Single-line commands of the README that set everything up."""
    return [line.strip() for line in README.splitlines() if line.strip().startswith("python -m venv")]


def test_two_commands():
    main, tests = commands()
    assert main.endswith(".venv/bin/python -m jobs.pretrain configs/text/quickstart.yaml")
    assert tests.endswith(".venv/bin/pytest")
    assert main.split("&&")[:2] == tests.split("&&")[:2]


def test_every_file_that_the_readme_names_exists():
    named = set(
        re.findall(r"(?:pipeline|jobs|configs|cluster|tests|docs)/[\w./-]*\w\.(?:py|yaml|md|png)", README)
    )
    assert len(named) > 3
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_main_command_in_a_copy_of_the_tree(tmp_path: Path):
    """What follows the installation, in a copy, with the environment that runs this test."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    name, *words = commands()[0].partition("-m jobs.")[2].split()
    out = job_output(name, *words, cwd=tmp_path, PYTHONPATH=str(tmp_path))  # the copy, not the installed tree
    ratio = re.search(r"model / unigram = ([\d.]+)", out)
    assert ratio is not None
    assert float(ratio[1]) <= 0.85, out[-2000:]
    assert "bigram perplexity" in out
    run_notebook("text", tmp_path)  # with the model of this run
    assert "mlflow ui --backend-store-uri" in out
    assert (tmp_path / "runs/quickstart/model/model.safetensors").is_file()
