"""Control files of a run: requests to stop or save, and errors that no restart can fix."""

import logging
import threading
import time

from pipeline import storage

log = logging.getLogger(__name__)

# Names in the run's folder.
STOP = "stop"  # finish the step, save a checkpoint, and end
SAVE = "save"  # finish the step, save a checkpoint, and continue
FATAL = "fatal.json"  # an error that no restart can fix


class Requests:
    """Requests to rank 0's training loop, collected between two steps.

    A thread checks for the files STOP and SAVE every second, so that no step waits for storage.

    Args:
        folder: of the run.
    """

    INTERVAL_S = 1.0
    NOTICE_INTERVAL_S = 5.0  # between questions to Ray, each of which costs a round trip

    def __init__(self, folder: str):
        self._stop = self._save = False
        self._last_notice_check = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=[folder], name="requests", daemon=True)
        self._thread.start()

    def _watch(self, folder: str) -> None:
        """Check for the files until the end."""
        stop, save = storage.join(folder, STOP), storage.join(folder, SAVE)
        while not self._closed.wait(self.INTERVAL_S):
            try:
                self._stop = self._stop or storage.exists(stop)
                if storage.exists(save):
                    storage.remove(save)
                    self._save = True
            except Exception as error:  # an outage of the storage passes
                log.warning("could not check the run folder for stop or save requests; retrying: %s", error)

    def take(self) -> tuple[bool, bool, bool]:
        """Take the requests that have arrived since the last call.

        Returns:
            Whether to stop, whether to save, and whether it is time to call `Session.notice`.
        """
        save, self._save = self._save, False
        now = time.monotonic()
        check_notice = now - self._last_notice_check > self.NOTICE_INTERVAL_S
        if check_notice:
            self._last_notice_check = now
        return self._stop, save, check_notice

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()
