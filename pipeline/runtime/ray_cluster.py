"""The Ray cluster that a job runs on: joining it, what it can hold, what all its nodes see, being stopped."""

import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage
from pipeline.config.schema import ClusterConfig
from pipeline.errors import CapabilityError, ConfigError
from pipeline.runtime.actors import Resources
from pipeline.runtime.control_files import STOP

log = logging.getLogger(__name__)


@contextmanager
def joined_cluster(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster that this job runs in (RAY_ADDRESS), else start a local Ray for the job."""
    mine = not ray.is_initialized()
    if mine:
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            cpus = max(os.cpu_count() or 1, config.least * config.cpus_per_worker)
            ray.init(address="local", num_cpus=cpus, logging_level=logging.WARNING)
        if threading.current_thread() is threading.main_thread():  # Ray's own handler ends without a word
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def check_resources(config: ClusterConfig) -> bool:
    """Whether the workers get a GPU each.

    Raises:
        CapabilityError: the cluster is too small for the fewest workers; without this, Ray would wait for ever.
    """
    there, asked = ray.cluster_resources(), config
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    auto = asked.accelerator == "auto"
    use_gpu = gpus > 0 if auto else asked.accelerator == "gpu"
    mine = len(ray.nodes()) == 1 and not os.environ.get("RAY_ADDRESS")
    if auto and mine and 0 < gpus < asked.least:  # a cluster is refused: nodes may have gone, or not come yet
        use_gpu = False
        log.warning("%d GPUs for %d workers: CPUs are used (cluster.accelerator: auto)", gpus, asked.least)
    if use_gpu and gpus < asked.least:
        raise CapabilityError(
            f"cluster.workers: {asked.least} workers of one GPU, the cluster has {gpus} GPUs; "
            f"expected {f'at most {gpus}, or ' if gpus else ''}cluster.accelerator=cpu"
        )
    if cpus < asked.least * asked.cpus_per_worker:
        raise CapabilityError(
            f"cluster.workers: {asked.least} workers of {asked.cpus_per_worker} CPUs, the cluster has {cpus}"
        )
    room = places(ray.nodes(), asked.cpus_per_worker, use_gpu)
    if room < asked.least:
        each = f"{asked.cpus_per_worker} CPUs{' and a GPU' if use_gpu else ''}"
        raise CapabilityError(
            f"cluster.workers: {asked.least} workers of {each}, the cluster's nodes have room for {room}"
        )
    return use_gpu


def places(nodes: Sequence[Mapping[str, Any]], cpus: int, use_gpu: bool) -> int:
    """Workers of so many CPUs, and perhaps a GPU, that fit: each is on one node.

    Args:
        nodes: what `ray.nodes()` says.
    """
    there = [node["Resources"] for node in nodes if node["Alive"]]
    fit = [(int(one.get("CPU", 0)) // cpus, int(one.get("GPU", 0))) for one in there]
    return sum(min(both) if use_gpu else both[0] for both in fit)


def available_resources(config: ClusterConfig) -> Resources:
    """What a job without an elastic group, such as sampling, starts with: as many actors as fit now, in bounds.

    Raises:
        CapabilityError: the cluster is too small.
    """
    use_gpu = check_resources(config)
    fit = places(ray.nodes(), config.cpus_per_worker, use_gpu)
    return Resources(max(config.least, min(config.most, fit)), config.cpus_per_worker, use_gpu)


def check_visible(run: str, uri: str) -> None:
    """Refuse a store or a folder that only this machine can see, if the cluster has others.

    Raises:
        ConfigError: names the key.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    machines = {node["NodeManagerAddress"] for node in alive}
    if len(machines) < 2:
        return
    nodes = [node["NodeID"] for node in alive]
    if uri.startswith("sqlite"):
        raise ConfigError(
            f"tracking.uri: {uri} is one machine's SQLite file and the cluster has {len(machines)} machines; "
            "expected the address of an MLflow server"
        )
    if not storage.is_local(run):
        return
    probe = storage.join(run, f"seen-{uuid.uuid4().hex}")
    storage.publish_bytes(probe, b"")
    look = ray.remote(num_cpus=0)(storage.exists)
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    seen = ray.get([look.options(scheduling_strategy=place).remote(probe) for place in places])
    storage.remove(probe)
    if not all(seen):
        raise ConfigError(
            f"cluster.storage: {run!r} is not the same folder on {seen.count(False)} of {len(nodes)} nodes; "
            "expected a shared folder, s3:// or gs://"
        )


@contextmanager
def stoppable(run: str) -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C ask the workers to save and end; the second one ends this process at once."""
    asked = threading.Event()
    file = storage.join(run, STOP)
    storage.remove(file)

    def ask(number: int, _: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        log.warning(
            "%s: saving a checkpoint and ending; once more to end at once", signal.Signals(number).name
        )
        storage.publish_bytes(file, b"")

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        storage.remove(file)
