"""The Ray that tests share."""

import ray


def start() -> None:
    """Two CPUs, in this process."""
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning"
    )
