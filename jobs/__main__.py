"""List the jobs: `python -m jobs`."""

import ast
from pathlib import Path


def jobs() -> dict[str, str]:
    """Return the first line of every job's docstring by the job's name, without importing the jobs."""
    sources = {file.stem: file.read_text("utf-8") for file in sorted(Path(__file__).parent.glob("[a-z]*.py"))}
    trees = {name: ast.parse(text) for name, text in sources.items() if 'if __name__ == "__main__"' in text}
    return {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in trees.items()}


if __name__ == "__main__":
    print("usage: python -m jobs.NAME CONFIG.yaml [section.key=value ...], or python -m jobs.NAME --help\n")
    for name, summary in jobs().items():
        print(f"  jobs.{name:<10} {summary}")
