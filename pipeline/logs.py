"""Log output of jobs: lines of the pipeline's own loggers, without credentials."""

import logging
import re
import warnings

_USER = re.compile(r"://[^/@\s]+@")


class _Public(logging.Formatter):
    """Formats lines without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def shown(text: str) -> str:
    """Cut user and password out of every address in a text, for logs, files and messages."""
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
    # Caused by DeepSpeed's calls into torch.distributed, which users cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
