"""The worker's side of MLflow: a log that never blocks training and survives an outage of the store."""

import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.tracking.items import Content, Item, Point, Upload, from_line, label, size, to_line
from pipeline.tracking.runs import connect, first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)

_MEMORY = 64 * 2**20  # bytes that may wait: a week of metrics, or hundreds of pictures
_BATCH = 1000  # metric points of one request, MLflow's limit
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds between attempts during an outage
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_SAMPLES = 3  # machine samples (10 s apart) averaged into one logged point


class _Gone(Exception):
    """An artifact was removed before it could be sent."""


class Tracker:
    """Logs into a run that the driver opened; used by one worker, rank 0.

    Calls return at once: a background thread delivers in order. While the store does not answer, everything
    waits in memory (up to 64 MiB) and is tried again with growing pauses; metrics keep the step and time of
    their call, so the history is complete afterwards. Nothing here raises into training: what goes wrong is
    a warning. A point delivered twice (a retry, a replay) is one point in MLflow; a step that a restart
    redoes has two, of which `metric_history` gives the later.

    Args:
        uri: from `tracking_uri`.
        run_id: from `open_run`.
        spill: file (JSON lines) that keeps what is undelivered during an outage and after `close`; the next
            Tracker given the same file delivers that first.
        system_metrics: sample this machine (CPU, memory, disk, network, GPUs) as MLflow's `system/` metrics.
    """

    def __init__(
        self, uri: str, run_id: str, spill: Path | None = None, system_metrics: bool = False
    ) -> None:
        # The thread below has its own patience; MLflow's (minutes within one call) would only delay `close`.
        self._set_retries = _RETRIES not in os.environ
        os.environ.setdefault(_RETRIES, "0")
        import mlflow  # noqa: F401  here, not in the thread, where it would race the worker's other imports

        self._uri, self._run_id, self._spill = uri, run_id, spill
        self._client: MlflowClient | None = None
        self._step = 0  # of the latest metrics; system metrics carry it
        self._change = threading.Condition()  # guards the fields below
        self._waiting: deque[Item] = deque()
        self._memory = 0
        self._lost = 0
        self._hurry = self._closing = self._abandoned = False
        self._spill_lock = threading.Lock()
        self._replay()
        self._sampling_over = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="tracker", daemon=True)
        self._thread.start()
        self._sampler: threading.Thread | None = None
        if system_metrics:
            self._sampler = threading.Thread(target=self._sample, name="tracker-system", daemon=True)
            self._sampler.start()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values measured now, at a training step."""
        now = int(time.time() * 1000)
        self._step = step
        for key, value in metrics.items():
            self._put(Point(key, float(value), step, now))

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Log a local file or folder, which must stay in place until it is delivered (see `flush`)."""
        self._put(Upload(str(path), folder))

    def log_text(self, text: str, file: str) -> None:
        """Log a text under a file name, such as `samples/step_1000.txt`."""
        self._put(Content(file, text.encode()))

    def log_figure(self, figure: "Figure", file: str) -> None:
        """Log a picture under a file name with a suffix; it is rendered before this returns."""
        buffer = BytesIO()
        try:
            figure.savefig(buffer, format=Path(file).suffix[1:])
        except Exception as error:
            _log.warning("figure %s was not drawn: %s", file, error)
            return
        self._put(Content(file, buffer.getvalue()))

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until everything logged so far is delivered; False if it is not after `timeout` seconds."""
        with self._change:
            self._hurry = True
            self._change.notify_all()
            return self._change.wait_for(lambda: not self._waiting, timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Deliver what waits, in at most `timeout` seconds; what is left goes to the spill file."""
        deadline = time.monotonic() + timeout
        if self._sampler is not None:
            self._sampling_over.set()
            self._sampler.join(timeout)
        with self._change:
            self._closing = self._hurry = True
            self._change.notify_all()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._change:
            if self._abandoned:
                return
            self._abandoned = True
            left = len(self._waiting)
        if left:
            kept = f"kept in {self._spill} for the next start" if self._save() else "lost"
            _log.warning("MLflow at %s still does not answer: %d items are %s", self._uri, left, kept)
        if self._set_retries:
            os.environ.pop(_RETRIES, None)
        if self._lost:
            _log.warning(
                "%d items never sent to MLflow, for want of memory or because the tracker was closed",
                self._lost,
            )

    def _put(self, item: Item) -> None:
        with self._change:
            full = self._memory + size(item) > _MEMORY
            if self._closing or full:
                if not self._lost:
                    why = "too much is waiting" if full else "the tracker is closed"
                    _log.warning("not sent to MLflow (%s): %s and what follows", why, label(item))
                self._lost += 1
                return
            self._waiting.append(item)
            self._memory += size(item)
            self._change.notify_all()

    def _deliver(self) -> None:
        """The thread: take from the head, send, remove; so that nothing is lost between the two."""
        delay = _FIRST_DELAY
        failing = False
        one_by_one = 0  # items of a refused batch still to be tried alone, to find the bad ones
        refused: set[str] = set()
        while batch := self._head(1 if one_by_one else _BATCH):
            try:
                self._send(batch)
            except Exception as error:  # whatever it is, training goes on
                if not _is_refusal(error):
                    if not failing:
                        _log.warning(
                            "MLflow at %s does not answer; metrics wait for it: %s",
                            self._uri,
                            first_line(error),
                        )
                    failing = True
                    self._save()
                    self._pause(delay)
                    delay = min(2 * delay, _LONGEST_DELAY)
                    continue
                if len(batch) > 1:
                    one_by_one = len(batch)
                    continue
                if label(batch[0]) not in refused:
                    _log.warning("MLflow refuses %s, which is left out: %s", label(batch[0]), error)
                refused.add(label(batch[0]))
            if failing:
                _log.warning(
                    "MLflow at %s answers again; %d items are on their way", self._uri, len(self._waiting)
                )
            failing, delay = False, _FIRST_DELAY
            one_by_one = max(0, one_by_one - 1)
            self._remove(batch)

    def _head(self, at_most: int) -> list[Item]:
        """The next items to send together: metric points up to `at_most`, or one artifact; [] at the end."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closing)
            if self._abandoned:
                return []
            points: list[Item] = []
            for item in self._waiting:
                if not isinstance(item, Point):
                    return points or [item]
                points.append(item)
                if len(points) == at_most:
                    break
            return points

    def _remove(self, batch: list[Item]) -> None:
        with self._change:
            if self._abandoned:  # `close` has counted and kept these
                return
            for item in batch:
                self._waiting.popleft()
                self._memory -= size(item)
            empty = not self._waiting
            self._change.notify_all()
        if empty and self._spill is not None:
            with self._spill_lock:
                self._spill.unlink(missing_ok=True)

    def _pause(self, delay: float) -> None:
        """Wait between attempts; `flush` and `close` cut it short."""
        with self._change:
            self._change.wait_for(lambda: self._hurry, delay)
            self._hurry = False

    def _send(self, batch: list[Item]) -> None:
        from mlflow.entities import Metric

        self._client = client = self._client or connect(self._uri)
        first = batch[0]
        if isinstance(first, Point):
            points = [item for item in batch if isinstance(item, Point)]
            client.log_batch(self._run_id, [Metric(p.key, p.value, p.timestamp, p.step) for p in points])
        elif isinstance(first, Upload):
            if not Path(first.path).exists():
                raise _Gone("the file is no longer there")
            send = client.log_artifacts if Path(first.path).is_dir() else client.log_artifact
            send(self._run_id, first.path, first.folder or None)
        else:
            folder, _, name = first.file.rpartition("/")
            with tempfile.TemporaryDirectory() as temporary:
                file = Path(temporary, name)
                file.write_bytes(first.data)
                client.log_artifact(self._run_id, str(file), folder or None)

    def _sample(self) -> None:
        """The thread of system metrics. MLflow's own monitor gathers; its thread would die in an outage."""
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor = SystemMetricsMonitor(
                self._run_id, samples_before_logging=_SAMPLES, tracking_uri=self._uri
            )
            while not self._sampling_over.is_set():
                for _ in range(monitor.samples_before_logging):
                    monitor.collect_metrics()
                    if self._sampling_over.wait(monitor.sampling_interval):
                        break
                values = {f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}
                self.log_metrics(values, self._step)
                for source in monitor.monitors:
                    source.clear_metrics()
        except Exception as error:
            _log.warning("system metrics of this machine end here: %s", error)

    def _save(self) -> bool:
        """Make the spill file hold exactly what waits; True if it does."""
        if self._spill is None:
            return False
        with self._spill_lock:
            with self._change:
                lines = [to_line(item) for item in self._waiting]
            try:
                self._spill.parent.mkdir(parents=True, exist_ok=True)
                partial = self._spill.with_name(self._spill.name + ".partial")
                partial.write_text("".join(lines), encoding="utf-8")
                partial.replace(self._spill)
            except OSError as error:
                _log.warning(
                    "%d items for MLflow could not be kept in %s: %s", len(lines), self._spill, error
                )
                return False
        return True

    def _replay(self) -> None:
        """Queue what an earlier Tracker left; the file goes once all of it is delivered."""
        if self._spill is None or not self._spill.exists():
            return
        try:
            for line in self._spill.read_text(encoding="utf-8").splitlines():
                self._put(from_line(line))
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s is damaged; what follows its damage is left out: %s", self._spill, error)


def _is_refusal(error: Exception) -> bool:
    """Whether the store answered that it will never take this, so that trying again is no use."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
    return isinstance(error, _Gone)
