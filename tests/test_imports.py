"""The structure of the code: import order, where the large dependencies are used, and sizes."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "errors",
    "arguments",
    "logs",
    "seeds",
    "compiling",
    "config",
    "storage",
    "tracking",
    "runtime",
    "models",
    "diffusion",
    "sampling",
    "data",
]
ORDER += [
    "trained",
    "run",
    "reports",
    "metrics",
    "planning",
    "training",
    "api",
    "export",
    "evaluation",
    "sweeps",
    "benchmarks",
    "jobs",
]
ONLY_IN = {
    "ray": {
        "runtime",
        "data.prepare",
        "metrics",
        "training.worker_group",
        "evaluation",
        "sweeps",
        "jobs",
    },
    "deepspeed": {"training.engine", "training.resume"},
    "mlflow": {"tracking"},
}
MOST_LINES = 500  # of a file
MOST_FILES = 14  # of a folder, beside packages and __init__.py
MOST_FUNCTION_LINES = 80
MOST_PARAMETERS = 8


def module_of(path: PurePosixPath) -> str:
    """pipeline/data/text.py -> data.text; pipeline/data/__init__.py -> data; jobs/a.py -> jobs.a."""
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "pipeline" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: PurePosixPath, source: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything a file imports at run time, inside functions too.

    What stands under `if TYPE_CHECKING:` does not count: it is never executed.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def rank(name: str) -> int | None:
    """Place in the order of an imported name; None for what is not ours, -1 for the package's own face."""
    parts = name.split(".")
    if parts[0] == "jobs":
        return ORDER.index("jobs")
    if parts[0] != "pipeline":
        return None
    return ORDER.index(parts[1]) if len(parts) > 1 and parts[1] in ORDER else -1


def violations(files: dict[str, str]) -> list[str]:
    """What breaks the rules in files given as path -> source, as `path:line: what` lines."""
    found = []
    for name, source in files.items():
        path = PurePosixPath(name)
        module = module_of(path)
        part = module.split(".")[0]
        if part and part not in ORDER:
            found.append(f"{name}:1: {part!r} has no place in the order of imports")
            continue
        # `pipeline/__init__.py` shows users what `api` offers, so it stands right behind it.
        own = ORDER.index(part or "api")
        for line, imported in imports_of(path, source):
            target = rank(imported)
            if target is not None and target > own:
                found.append(f"{name}:{line}: {part or 'pipeline'} imports {imported}, which comes after it")
            if target == -1 and part and part != "jobs":
                found.append(f"{name}:{line}: imports {imported} from the package's own face")
            places = ONLY_IN.get(imported.split(".")[0])
            if places is not None and not any(f"{module}.".startswith(f"{place}.") for place in places):
                found.append(f"{name}:{line}: {imported} may be imported only in {', '.join(sorted(places))}")
        lines = source.count("\n")
        if lines > MOST_LINES:
            found.append(f"{name}:{lines}: more than {MOST_LINES} lines")
        found += [f"{name}:{line}: {problem}" for line, problem in large_functions(source)]
    folders = Counter(path.parent for path in map(PurePosixPath, files) if path.name != "__init__.py")
    found += [
        f"{folder}: more than {MOST_FILES} files" for folder, count in folders.items() if count > MOST_FILES
    ]
    return found


def large_functions(source: str) -> Iterator[tuple[int, str]]:
    """(line, problem) of functions with too many lines or parameters, `self` and `cls` not counted."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MOST_FUNCTION_LINES:
            yield node.lineno, f"{node.name} has more than {MOST_FUNCTION_LINES} lines"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        if len([a for a in arguments if a.arg not in ("self", "cls")]) > MOST_PARAMETERS:
            yield node.lineno, f"{node.name} has more than {MOST_PARAMETERS} parameters"


def test_the_code_keeps_its_shape() -> None:
    paths = [path for folder in ("pipeline", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 20
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    assert violations(files) == []


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("pipeline/models/pgm.py", "from pipeline.training.loop import run", "comes after it"),
        ("pipeline/models/pgm.py", "import pipeline.data.shards", "comes after it"),
        ("pipeline/models/pgm.py", "from pipeline import training", "comes after it"),
        ("pipeline/models/pgm.py", "from ..data import shards", "comes after it"),
        ("pipeline/models/pgm.py", "def f():\n    import pipeline.api", "py:2: models imports"),
        ("pipeline/api/model.py", "from jobs.pretrain import main", "comes after it"),
        ("pipeline/data/text.py", "from pipeline import load_model", "own face"),
        ("pipeline/data/reading_order.py", "import ray.data", "only in data.prepare"),
        ("pipeline/data/prepared.py", "import ray", "only in data.prepare"),
        ("pipeline/training/loop.py", "import deepspeed", "only in training.engine"),
        ("pipeline/training/loop.py", "from mlflow import MlflowClient", "only in tracking"),
        ("pipeline/helpers.py", "", "no place in the order"),
        ("jobs/pretrain.py", "x = 1\n" * 501, "more than 500 lines"),
        ("pipeline/run.py", "def f():\n" + "    x = 1\n" * 80, "f has more than 80 lines"),
        ("pipeline/run.py", "def f(a, b, c, d, e, f, g, *, h, i): ...", "more than 8 parameters"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_caught(path: str, source: str, says: str) -> None:
    (found,) = violations({path: source})
    assert says in found


def test_a_crowded_folder_is_caught() -> None:
    crowded = {f"pipeline/models/file_{index}.py": "" for index in range(MOST_FILES + 1)}
    assert violations(crowded) == ["pipeline/models: more than 14 files"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "pipeline/training/worker_group.py",
            "import ray.train\nfrom pipeline.data import shards\nfrom . import engine",
        ),
        ("pipeline/data/prepare/workflow.py", "import ray\nfrom pipeline.errors import DataError"),
        ("pipeline/metrics/draw.py", "import ray"),
        ("pipeline/tracking/runs.py", "import mlflow\nimport rayon"),
        ("pipeline/__init__.py", "from pipeline.api import load_model"),
        ("jobs/sample.py", "import ray\nfrom pipeline import load_model"),
        ("pipeline/run.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): ..."),
        ("pipeline/models/pgm.py", "if TYPE_CHECKING:\n    from pipeline.training.loop import run"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations({path: source}) == []
