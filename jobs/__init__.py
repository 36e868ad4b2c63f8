"""Entry points: `python -m jobs.NAME CONFIG.yaml [section.key=value ...]`."""

import sys
from collections.abc import Callable

from pipeline import logs
from pipeline.config.load import load
from pipeline.config.schema import RunConfig
from pipeline.errors import PipelineError


def main(run: Callable[[RunConfig], object]) -> None:
    """Load the config that the command line names and run it; users' mistakes come without a traceback."""
    command(lambda words: run(load(words[0], words[1:])), "CONFIG.yaml [section.key=value ...]", least=1)


def command(run: Callable[[list[str]], object], usage: str, least: int) -> None:
    """Run with the words of the command line, of which there must be at least `least`."""
    module = sys.modules["__main__"]
    words = sys.argv[1:]
    if len(words) < least or words[0] in ("-h", "--help"):
        name = module.__spec__.name if module.__spec__ else "jobs"
        print(f"{(module.__doc__ or '').strip()}\n\nusage: python -m {name} {usage}")
        sys.exit(0 if words and words[0] in ("-h", "--help") else 2)
    logs.show()
    try:
        run(words)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
