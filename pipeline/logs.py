"""Log lines of jobs, without credentials, and the progress of long operations."""

import logging
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

_USER = re.compile(r"://[^/@\s]+@")


class _Public(logging.Formatter):
    """Formats lines without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def shown(text: str) -> str:
    """Cut user and password out of every address in a text, for logs, files and messages.

    Args:
        text: with or without addresses.
    """
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


class Progress:
    """The progress of a long operation, logged every few seconds: counts, throughput and the time left.

    Args:
        verb: what was done, as in "wrote 3 of 5 shards".
        items: what is counted, in the plural.
        total: number of items.
        unit: unit of the amounts in the items, in the plural, such as "tokens".
        interval: seconds between two lines; the last item is always logged.
    """

    def __init__(self, verb: str, items: str, total: int, unit: str, interval: float = 5.0) -> None:
        self._verb, self._items, self._total, self._unit, self._interval = verb, items, total, unit, interval
        self._count = self._amount = 0
        self._start = self._last_line = time.monotonic()

    def add(self, amount: int) -> None:
        """Count one more item as done.

        Args:
            amount: size of the item, in the unit of the log lines.
        """
        self._count += 1
        self._amount += amount
        now = time.monotonic()
        if now - self._last_line < self._interval and self._count < self._total:
            return
        self._last_line = now
        seconds = max(now - self._start, 1e-9)
        left = seconds / self._count * (self._total - self._count)
        counts = f"{self._count} of {self._total} {self._items}, {self._amount} {self._unit}"
        rate = self._amount / seconds
        log.info("%s %s, %.0f %s/s, %.0f s left", self._verb, counts, rate, self._unit, left)


def progress_bar(progress: Any, unit: str) -> Callable[[int, int], None] | None:
    """Return a function that shows how far an operation is.

    Args:
        progress: True: a progress bar on standard error; False or None: nothing; a function: that function.
        unit: what is counted, in the plural.

    Returns:
        A function of (done, total), or None.

    Raises:
        ConfigError: another value.
    """
    if progress is None or progress is False:
        return None
    if progress is not True:
        if not callable(progress):
            raise ConfigError(f"progress: {progress!r}; expected True, False or a function of (done, total)")
        return progress
    bar = tqdm(unit=f" {unit}")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show
