"""`python -m jobs.NAME ...` in this process, which has the imports already."""

import io
import logging
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a job."""

    code: int
    stdout: str
    stderr: str


def run_job(name: str, *words: str) -> Ended:
    """Run a job to its end, whether good or bad."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    logger = logging.getLogger("pipeline")
    before = logger.handlers[:], logger.level, logger.propagate
    with patch.object(sys, "argv", [name, *words]), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_module(f"jobs.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:  # the job took the log lines to itself
            logger.handlers[:], logger.level, logger.propagate = before
    return Ended(code, out.getvalue(), err.getvalue())
