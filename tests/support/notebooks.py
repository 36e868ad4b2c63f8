"""Run an example notebook from the first to the last cell."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_notebook(name: str, root: Path = ROOT, storage: str = "runs") -> None:
    """Run a notebook of docs/examples; a cell that raises is an error. Needs the extra `docs`.

    Args:
        name: of the notebook.
        root: of the tree whose notebook and code are run.
        storage: folder of the runs; a finished run of the notebook's config is used as it is.
    """
    import nbformat
    from nbclient import NotebookClient

    file = root / "docs" / "examples" / f"{name}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"PIPELINE_STORAGE": storage, "PYTHONPATH": str(root), "MPLBACKEND": "agg"}
    resources = {"metadata": {"path": str(file.parent)}}
    NotebookClient(notebook, timeout=400, resources=resources).execute(env=environment)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
