"""Entry points: `python -m jobs.NAME CONFIG.yaml [section.key=value ...]`."""

import sys
from collections.abc import Callable

from pipeline import logs
from pipeline.config.load import load
from pipeline.config.schema import RunConfig
from pipeline.errors import PipelineError


def main(run: Callable[[RunConfig], object]) -> None:
    """Load the config that the command line names and run it; users' mistakes come without a traceback."""
    module = sys.modules["__main__"]
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        name = module.__spec__.name if module.__spec__ else "jobs"
        print(
            f"{(module.__doc__ or '').strip()}\n\nusage: python -m {name} CONFIG.yaml [section.key=value ...]"
        )
        sys.exit(0 if words else 2)
    logs.show()
    try:
        run(load(words[0], words[1:]))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
