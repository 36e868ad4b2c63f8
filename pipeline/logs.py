"""What a job says while it works: one line a fact, from our own loggers only."""

import logging
import re
import warnings

_USER = re.compile(r"://[^/@\s]+@")


class _Public(logging.Formatter):
    """Lines without what only the job should know."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def shown(text: str) -> str:
    """The text with user and password cut out of every address in it, fit for logs, files and messages."""
    return _USER.sub("://", text)


def show() -> None:
    """Print the pipeline's own log lines of this process, with the time."""
    logger = logging.getLogger("pipeline")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Public("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # DeepSpeed's calls into torch.distributed, which no user of ours can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
