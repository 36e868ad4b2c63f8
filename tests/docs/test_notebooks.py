"""The example notebooks are valid, and run from the first to the last cell."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "examples").glob("*.ipynb"))


def test_both_notebooks_are_there() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["images", "text"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_cells_compile_and_hold_no_outputs(file: Path) -> None:
    notebook = json.loads(file.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            assert cell["outputs"] == []


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that raises fails the test; the notebooks need the extra `docs`."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PIPELINE_STORAGE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(file.parent)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert (tmp_path / f"{file.stem}_example" / "model").is_dir()
