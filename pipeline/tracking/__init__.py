"""MLflow: the run, its metrics and files, the data it read, the models it made.

Only this package imports mlflow. The driver opens and ends a run (`store`) and handles its models
(`registry`); rank 0 of the workers logs into that run through a `Tracker`, which never blocks training and
never fails it.
"""

from pipeline.tracking.journal import Tracker
from pipeline.tracking.registry import download_model, find_version, register_model, set_alias
from pipeline.tracking.runs import (
    child_of,
    end_run,
    ending,
    log_dataset,
    metric_history,
    open_recorded_run,
    open_run,
    recorded_run,
    tracking_uri,
)

__all__ = [
    "Tracker",
    "child_of",
    "download_model",
    "end_run",
    "ending",
    "find_version",
    "log_dataset",
    "metric_history",
    "open_recorded_run",
    "open_run",
    "recorded_run",
    "register_model",
    "set_alias",
    "tracking_uri",
]
