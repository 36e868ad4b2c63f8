"""Control files of a run: requests to stop or save, and errors that no restart can mend."""

import logging
import threading
import time

from pipeline import storage

log = logging.getLogger(__name__)

STOP = "stop"  # file in the run's folder: finish the step, save, and end
SAVE = "save"  # likewise: finish the step, save, and go on
FATAL = "fatal.json"  # in the run's folder: an error that no restart can mend


class Requests:
    """What rank 0's loop is asked to do between two steps.

    A thread looks for the files STOP and SAVE every second, so that no step waits for storage.
    """

    EVERY_S = 1.0
    LOOK_S = 5.0  # between questions to Ray, each of which costs a round trip

    def __init__(self, run: str):
        self._stop = self._save = False
        self._looked = time.monotonic()
        self._files = [storage.join(run, name) for name in (STOP, SAVE)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="requests", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        stop, save = self._files
        while not self._over.wait(self.EVERY_S):
            try:
                self._stop = self._stop or storage.exists(stop)
                if storage.exists(save):
                    storage.remove(save)
                    self._save = True
            except Exception as error:  # storage's troubles are over sooner or later
                log.warning("no look at the run's folder for requests: %s", error)

    def take(self) -> tuple[bool, bool, bool]:
        """Whether to stop, to save, and to call `notice`."""
        save, self._save = self._save, False
        now = time.monotonic()
        look = now - self._looked > self.LOOK_S
        if look:
            self._looked = now
        return self._stop, save, look

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()
