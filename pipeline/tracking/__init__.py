"""MLflow: the run, its metrics and files, the data it reads, the models it makes.

Only this package imports mlflow. The driver opens and ends a run (`runs`) and handles its models (`registry`). Rank 0
of the workers logs into that run through a `Tracker` (`journal`), which never blocks training and never fails it.
"""

# ruff: noqa: F401  these imports are the package's interface

from pipeline.tracking.journal import Tracker
from pipeline.tracking.registry import download_model, find_version, register_model, set_alias
from pipeline.tracking.runs import (
    check_store,
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
