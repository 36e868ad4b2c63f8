"""Metrics and artifacts of a worker: delivered in the background, and kept during an outage of the MLflow store."""

import base64
import json
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import first_line
from pipeline.storage.retries import transient
from pipeline.tracking.runs import connect

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_MEMORY = 64 * 2**20  # bytes that may wait: a week of metrics, or hundreds of pictures
_BATCH = 1000  # metric points of one request, MLflow's limit
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds between attempts during an outage
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_SAMPLES = 3  # machine samples (10 s apart) averaged into one logged point


class _MissingArtifact(Exception):
    """An artifact was removed before it could be sent."""


class _Unreachable(Exception):
    """The store of the runs cannot be opened."""


@dataclass(frozen=True)
class Point:
    """One value of one metric.

    Attributes:
        key: the metric's name.
        value: its value.
        step: training step.
        timestamp: of the measurement, milliseconds.
    """

    key: str
    value: float
    step: int
    timestamp: int


@dataclass(frozen=True)
class Content:
    """An artifact that exists in memory only.

    Attributes:
        file: path in the run's artifacts.
        data: content.
    """

    file: str
    data: bytes

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Log the content to a run.

        Args:
            client: of the store.
            run_id: the run.
        """
        folder, _, name = self.file.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary, name)
            file.write_bytes(self.data)
            client.log_artifact(run_id, str(file), folder or None)


@dataclass(frozen=True)
class Upload:
    """An artifact that is a file or folder on disk.

    Attributes:
        path: local path.
        folder: folder in the run's artifacts; empty for their root.
    """

    path: str
    folder: str

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Log the file or folder to a run.

        Args:
            client: of the store.
            run_id: the run.

        Raises:
            _MissingArtifact: the file or folder no longer exists.
        """
        if not Path(self.path).exists():
            raise _MissingArtifact("the file no longer exists")
        send = client.log_artifacts if Path(self.path).is_dir() else client.log_artifact
        send(run_id, self.path, self.folder or None)


Item = Point | Content | Upload
_KINDS: dict[str, Any] = {"point": Point, "content": Content, "upload": Upload}


def to_line(item: Item) -> str:
    """Write an item as a line of the spill file (JSON)."""
    fields = asdict(item)
    if isinstance(item, Content):
        fields["data"] = base64.b64encode(item.data).decode()
    return json.dumps({"kind": type(item).__name__.lower()} | fields) + "\n"


def from_line(line: str) -> Item:
    """Read an item from a line that `to_line` wrote.

    Raises:
        ValueError: the line is damaged (so do KeyError and TypeError).
    """
    fields = json.loads(line)
    kind = fields.pop("kind")
    if kind == "content":
        fields["data"] = base64.b64decode(fields["data"])
    return _KINDS[kind](**fields)


class _Queue:
    """Metrics or artifacts that wait to be delivered, in order, by a thread of their own.

    Attributes:
        what: "metrics" or "artifacts".
        at_most: items of one request.
        waiting: the items.
        hurry: whether the pause between two attempts ends now.
        refused: number of items that were left out.
        thread: delivers.
    """

    def __init__(self, what: str, at_most: int):
        self.what, self.at_most = what, at_most
        self.waiting: deque[Item] = deque()
        self.hurry, self.refused = False, 0
        self.thread: threading.Thread | None = None


class Tracker:
    """Logs into a run that the driver opened; used by one worker, rank 0.

    Calls return at once, and background threads deliver in order: one for metrics and one for artifacts, so that
    metrics never wait for artifacts. While a store does not answer, everything for it waits in memory (up to 64 MiB)
    and is sent again after growing pauses. What a store will never take is left out with a warning. Metrics keep
    the step and time of their call, so that the history is complete afterwards. No method raises: problems are logged
    as warnings. A point that is delivered twice (a retry, a replay) is one point in MLflow. A step that a restart
    repeats has two, of which `metric_history` returns the later.

    Args:
        uri: from `tracking_uri`.
        run_id: from `open_run`.
        spill: file (JSON lines) of what is not delivered yet during an outage and after `close`; the next Tracker
            with the same file delivers that first.
        system_metrics: sample this machine (CPU, memory, disk, network, GPUs) as MLflow's `system/` metrics.
    """

    def __init__(
        self, uri: str, run_id: str, spill: Path | None = None, system_metrics: bool = False
    ) -> None:
        # The thread below repeats calls itself; MLflow's own retries (minutes in one call) would only delay `close`.
        self._set_retries = _RETRIES not in os.environ
        os.environ.setdefault(_RETRIES, "0")
        import mlflow  # noqa: F401  not in the thread, where it would race the worker's other imports

        self._uri, self._run_id, self._spill = uri, run_id, spill
        self._client: MlflowClient | None = None
        self._step = 0  # of the latest metrics; system metrics carry it
        self._change = threading.Condition()  # guards the fields below
        self._metrics, self._artifacts = _Queue("metrics", _BATCH), _Queue("artifacts", 1)
        self._queues = (self._metrics, self._artifacts)
        self._memory = 0
        self._dropped = 0
        self._closing = self._abandoned = False
        self._spill_lock = threading.Lock()
        self._replay()
        self._sampling_over = threading.Event()
        for queue in self._queues:
            name = f"tracker-{queue.what}"
            queue.thread = threading.Thread(target=self._deliver, args=[queue], name=name, daemon=True)
            queue.thread.start()
        self._sampler = threading.Thread(target=self._sample, name="tracker-system", daemon=True)
        if system_metrics:
            self._sampler.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values measured now.

        Args:
            metrics: values by name.
            step: training step.
        """
        now = int(time.time() * 1000)
        self._step = step
        for key, value in metrics.items():
            self._put(Point(key, float(value), step, now))

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Log a local file or folder.

        Args:
            path: must exist until it is delivered (see `flush`).
            folder: folder in the run's artifacts; empty for their root.
        """
        self._put(Upload(str(path), folder))

    def log_text(self, text: str, file: str) -> None:
        """Log a text.

        Args:
            text: the content.
            file: path in the run's artifacts, such as `samples/step_1000.txt`.
        """
        self._put(Content(file, text.encode()))

    def log_figure(self, figure: "Figure", file: str) -> None:
        """Log a picture; it is rendered before this returns.

        Args:
            figure: the picture.
            file: path in the run's artifacts; its suffix is the format.
        """
        buffer = BytesIO()
        try:
            figure.savefig(buffer, format=Path(file).suffix[1:])
        except Exception as error:
            log.warning("figure %s could not be drawn: %s", file, error)
            return
        self._put(Content(file, buffer.getvalue()))

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until everything logged so far is delivered.

        Args:
            timeout: seconds to wait at most.

        Returns:
            Whether everything is delivered.
        """
        with self._change:
            self._end_pauses()
            return self._change.wait_for(lambda: not self._left(), timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Deliver what waits; what is not delivered in time goes to the spill file.

        Args:
            timeout: seconds to wait at most.
        """
        deadline = time.monotonic() + timeout
        self._sampling_over.set()
        if self._sampler.is_alive():
            self._sampler.join(timeout)
        with self._change:
            self._closing = True
            self._end_pauses()
        for queue in self._queues:
            assert queue.thread is not None
            queue.thread.join(max(0.0, deadline - time.monotonic()))
        with self._change:
            if self._abandoned:
                return
            self._abandoned = True
            left = self._left()
        if left:
            kept = f"kept in {self._spill} for the next start" if self._save() else "lost"
            log.warning("MLflow at %s still does not answer: %d items are %s", self._uri, left, kept)
        for queue in self._queues:
            if queue.refused:
                log.warning("MLflow at %s has refused %d %s", self._uri, queue.refused, queue.what)
        if self._set_retries:
            os.environ.pop(_RETRIES, None)
        if self._dropped:
            log.warning(
                "%d items were not sent to MLflow: too many were waiting, or the tracker was closed",
                self._dropped,
            )

    def _left(self) -> int:
        """Number of items that wait."""
        return sum(len(queue.waiting) for queue in self._queues)

    def _end_pauses(self) -> None:
        """Let all threads make their next attempt now."""
        for queue in self._queues:
            queue.hurry = True
        self._change.notify_all()

    def _put(self, item: Item) -> None:
        """Queue an item, if there is room."""
        with self._change:
            full = self._memory + _size(item) > _MEMORY
            if self._closing or full:
                if not self._dropped:
                    why = "too many items are waiting" if full else "the tracker is closed"
                    log.warning("not sent to MLflow (%s): %s and all later items", why, _label(item))
                self._dropped += 1
                return
            (self._metrics if isinstance(item, Point) else self._artifacts).waiting.append(item)
            self._memory += _size(item)
            self._change.notify_all()

    def _deliver(self, queue: _Queue) -> None:
        """Run a thread: send from the head of a queue, then remove, so that nothing is lost in between."""
        delay = _FIRST_DELAY
        failing = False
        one_by_one = 0  # items of a refused batch that are still to be sent alone, to find the bad ones
        told: set[str] = set()
        while batch := self._head(queue, 1 if one_by_one else queue.at_most):
            try:
                self._send(batch)
            except Exception as error:  # whatever it is, training goes on
                if not _is_refusal(error, batch[0]):
                    if not failing:
                        why = first_line(error)
                        log.warning(
                            "MLflow at %s does not answer; %s wait for it: %s", self._uri, queue.what, why
                        )
                    failing = True
                    self._save()
                    self._pause(queue, delay)
                    delay = min(2 * delay, _LONGEST_DELAY)
                    continue
                if len(batch) > 1:
                    one_by_one = len(batch)
                    continue
                queue.refused += 1
                if (reason := _reason(error, batch[0])) not in told:
                    log.warning(
                        "MLflow refuses %s, which is left out: %s", _label(batch[0]), first_line(error)
                    )
                told.add(reason)
            if failing:
                sending = len(queue.waiting)
                log.warning("MLflow at %s answers again; sending %d %s", self._uri, sending, queue.what)
            failing, delay = False, _FIRST_DELAY
            one_by_one = max(0, one_by_one - 1)
            self._remove(queue, batch)

    def _head(self, queue: _Queue, at_most: int) -> list[Item]:
        """Wait for the next items of a queue to send together; [] at the end."""
        with self._change:
            self._change.wait_for(lambda: queue.waiting or self._closing)
            return [] if self._abandoned else list(islice(queue.waiting, at_most))

    def _remove(self, queue: _Queue, batch: list[Item]) -> None:
        """Remove delivered items from a queue, and the spill file with the last of them."""
        with self._change:
            if self._abandoned:  # `close` has counted and kept these
                return
            for _ in batch:
                self._memory -= _size(queue.waiting.popleft())
            empty = not self._left()
            self._change.notify_all()
        if empty and self._spill is not None:
            with self._spill_lock, self._change:  # in the order of `_save`
                if not self._left():  # the other queue may have saved an item since
                    self._spill.unlink(missing_ok=True)

    def _pause(self, queue: _Queue, delay: float) -> None:
        """Wait between attempts; `flush` and `close` end the wait."""
        with self._change:
            self._change.wait_for(lambda: queue.hurry, delay)
            queue.hurry = False

    def _send(self, batch: list[Item]) -> None:
        """Send metric points, or one artifact."""
        from mlflow.entities import Metric

        if self._client is None:
            try:
                self._client = connect(self._uri)
            except Exception as error:
                raise _Unreachable(first_line(error)) from error
        client = self._client
        metrics = [Metric(p.key, p.value, p.timestamp, p.step) for p in batch if isinstance(p, Point)]
        if metrics:
            client.log_batch(self._run_id, metrics)
        elif not isinstance(batch[0], Point):
            batch[0].send(client, self._run_id)

    def _sample(self) -> None:
        """Run the thread of system metrics. MLflow's monitor gathers; its own thread would die in an outage."""
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
            log.warning("system metrics of this machine are no longer logged: %s", error)

    def _save(self) -> bool:
        """Write exactly what waits into the spill file; True on success."""
        if self._spill is None:
            return False
        with self._spill_lock:
            with self._change:
                lines = [to_line(item) for queue in self._queues for item in queue.waiting]
            try:
                self._spill.parent.mkdir(parents=True, exist_ok=True)
                partial = self._spill.with_name(self._spill.name + ".partial")
                partial.write_text("".join(lines), encoding="utf-8")
                partial.replace(self._spill)
            except OSError as error:
                log.warning("%d items for MLflow could not be kept in %s: %s", len(lines), self._spill, error)
                return False
        return True

    def _replay(self) -> None:
        """Queue what an earlier Tracker left; the file is removed once all of it is delivered."""
        if self._spill is None or not self._spill.exists():
            return
        try:
            for line in self._spill.read_text(encoding="utf-8").splitlines():
                self._put(from_line(line))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged; the lines from there on are left out: %s", self._spill, error)


def _size(item: Item) -> int:
    """Bytes of an item in memory, roughly."""
    return 300 + (len(item.data) if isinstance(item, Content) else 0)


def _label(item: Item) -> str:
    """Name of an item in warnings."""
    if isinstance(item, Point):
        return f"metric {item.key!r}"
    return f"artifact {item.file if isinstance(item, Content) else item.path!r}"


def _reason(error: Exception, item: Item) -> str:
    """What is told once: a metric that is refused, or a kind of error of the store of artifacts."""
    if isinstance(item, Point) or isinstance(error, _MissingArtifact):
        return _label(item)
    return type(error).__name__


def _is_refusal(error: Exception, item: Item) -> bool:
    """Whether the store will never take an item, so that another attempt is of no use.

    An error that is not known is taken for an outage of the store of metrics, of which nothing is lost, but for a
    refusal of the store of artifacts: credentials, packages or folders that are missing come as errors of any type.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        refused = error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
        code = error.get_http_status_code()
        return refused or (not isinstance(item, Point) and code < 500 and code not in (408, 429))
    if isinstance(item, Point) or isinstance(error, _Unreachable):
        return False
    return not transient(error)
