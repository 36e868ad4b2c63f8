"""Traces of training steps by torch's profiler."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipeline import storage
from pipeline.run import Run
from pipeline.tracking import Tracker

log = logging.getLogger(__name__)

SKIPPED = 10  # steps of a start that are not traced: the first ones compile kernels and fill caches


@contextmanager
def profiled(run: Run, rank: int, tracker: Tracker | None) -> Iterator[Callable[[], None]]:
    """Trace `train.profile_steps` steps of rank 0, and write the trace to the folder `profile` of the run.

    Args:
        run: whose steps are traced.
        rank: of this worker.
        tracker: logs a table of the operations that took longest; None: only the file is written.

    Returns:
        A context manager that gives a function to call after every step.
    """
    steps = run.config.train.profile_steps
    if not steps or rank > 0:
        yield lambda: None
        return
    place = storage.join(run.folder, "profile", "trace.json.gz")

    def write(profiler: torch.profiler.profile) -> None:
        with storage.scratch() as folder:
            file = folder / "trace.json.gz"
            profiler.export_chrome_trace(str(file))
            storage.publish_bytes(place, file.read_bytes())
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=50)
        if tracker:
            tracker.log_text(table, "profile/operations.txt")
        log.info("traced %d steps: %s, for ui.perfetto.dev", steps, place)

    schedule = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
