"""The Ray cluster of a job: joining it, its resources, what all of its nodes can see, and stop requests."""

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import Any
from urllib.parse import urlsplit

import grpc
import ray
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage
from pipeline.config.schema import ClusterConfig
from pipeline.errors import CapabilityError, ConfigError, first_line
from pipeline.runtime.actors import Resources
from pipeline.runtime.control_files import STOP

log = logging.getLogger(__name__)

SOON_S, ANSWER_S = 3.0, 30.0  # seconds that a cluster may take to answer before a warning, and after it


def start(**settings: Any) -> None:
    """Join or start Ray, whose sockets and logs lie in the temporary folder of this machine.

    Args:
        settings: of `ray.init`.

    Raises:
        ConfigError: the temporary folder cannot be written, or its path is too long; names the variable.
    """
    variable = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    folder = os.environ.get(variable)
    if folder:
        storage.check_writable(folder, variable)
    try:
        ray.init(**settings)
    except OSError as error:
        if not folder or "AF_UNIX" not in str(error):
            raise
        what = "is too long for the paths of Ray's sockets; expected a shorter one, such as /tmp"
        raise ConfigError(f"{variable}: {folder!r} {what}") from None


@contextmanager
def joined_cluster(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray, for the time of the block.

    A cluster without room for the job is asked for nodes, see `requested_nodes`.

    Args:
        config: a local Ray gets CPUs for its smallest number of workers, or those of the machine if they are more.

    Raises:
        ConfigError: there is no cluster at RAY_ADDRESS.
    """
    if ray.is_initialized():  # by the caller, who also shuts it down
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        join(address)
    else:
        cpus = max(os.cpu_count() or 1, config.least * config.cpus_per_worker)
        start(address="local", num_cpus=cpus, logging_level=logging.WARNING)
    if threading.current_thread() is threading.main_thread():  # Ray's own handler ends without a message
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with requested_nodes(config) if address else nullcontext():
            yield
    finally:
        ray.shutdown()


@contextmanager
def requested_nodes(config: ClusterConfig) -> Iterator[None]:
    """Ask the autoscaler of the joined cluster for the nodes of a job, and wait until its workers fit.

    After `cluster.wait_s` the block begins without them. The request is withdrawn at the end of the block.

    Args:
        config: bounds of the number of workers, CPUs and accelerator of each.
    """
    (count, use_gpu), deadline = fitting_workers(config), time.monotonic() + config.wait_s
    if count >= config.least or not config.wait_s:
        yield
        return
    asked, seen = None, -1
    try:
        while count < config.least and time.monotonic() < deadline:
            bundle = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
            if bundle != asked:
                request_resources(bundles=[bundle] * config.most)
            if count != seen:
                log.warning(
                    "the cluster has room for %d of %d workers: nodes are requested; waiting up to %.0f s "
                    "(cluster.wait_s)",
                    count,
                    config.least,
                    config.wait_s,
                )
            asked, seen = bundle, count
            time.sleep(1.0)
            count, use_gpu = fitting_workers(config)
        yield
    finally:
        with suppress(Exception):  # the cluster may be gone, and the request with it
            request_resources(bundles=[])


def join(address: str) -> None:
    """Join a cluster, or say in one line why that is not possible.

    Args:
        address: value of RAY_ADDRESS.

    Raises:
        ConfigError: it is no address of a cluster, or no cluster answers there within half a minute.
    """
    if address not in ("auto", "local"):
        check_answers(address)
    try:
        start(address=address, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(f"RAY_ADDRESS: {address!r}: {first_line(error)}") from error


def check_answers(address: str) -> None:
    """Refuse an address at which no cluster answers; Ray would wait for many minutes without a word.

    Args:
        address: value of RAY_ADDRESS, other than auto and local.

    Raises:
        ConfigError: it is no address, or nothing answers there that speaks Ray's protocol.
    """
    expected = "expected HOST:PORT of the head node (by default 6379), ray://HOST:10001, auto or local"
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS: {address!r} is the dashboard's, for `ray job submit` alone; {expected}"
        )
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        place = parts.netloc if parts.scheme == "ray" and parts.hostname and parts.port else ""
    except ValueError:
        place = ""
    if not place:
        raise ConfigError(f"RAY_ADDRESS: {address!r}; {expected}")
    if os.environ.get("RAY_USE_TLS") == "1":  # its certificates are Ray's business
        return
    with closing(grpc.insecure_channel(place, [("grpc.enable_http_proxy", 0)])) as channel:
        ready = grpc.channel_ready_future(channel)
        with suppress(grpc.FutureTimeoutError):
            ready.result(SOON_S)
            return
        log.warning("RAY_ADDRESS: no cluster answers at %r; waiting for %.0f s", address, ANSWER_S)
        try:
            ready.result(ANSWER_S)
        except grpc.FutureTimeoutError:
            raise ConfigError(
                f"RAY_ADDRESS: no cluster answers at {address!r}; {expected}, or no RAY_ADDRESS for a Ray of its own"
            ) from None


def places(nodes: Sequence[Mapping[str, Any]], cpus: int, use_gpu: bool) -> int:
    """Count the workers that fit the nodes; a worker must fit one node.

    Args:
        nodes: as `ray.nodes()` gives them.
        cpus: CPUs of a worker.
        use_gpu: whether a worker has a GPU as well.

    Returns:
        The number of workers.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    by_node = [(int(node.get("CPU", 0)) // cpus, int(node.get("GPU", 0))) for node in resources]
    return sum(min(by_cpu, by_gpu) if use_gpu else by_cpu for by_cpu, by_gpu in by_node)


def fitting_workers(config: ClusterConfig) -> tuple[int, bool]:
    """Count the workers of a job that fit the joined cluster.

    Args:
        config: CPUs and accelerator of a worker; its bounds decide whether `auto` means GPUs.

    Returns:
        Number of workers, and whether each of them gets a GPU.
    """
    gpus, auto = int(ray.cluster_resources().get("GPU", 0)), config.accelerator == "auto"
    use_gpu = gpus > 0 if auto else config.accelerator == "gpu"
    one_machine = len(ray.nodes()) == 1 and not os.environ.get("RAY_ADDRESS")
    # On a cluster, too few GPUs are an error: nodes may have gone, or not come yet.
    if auto and one_machine and 0 < gpus < config.least:
        use_gpu = False
        log.warning("%d GPUs for %d workers: CPUs are used (cluster.accelerator: auto)", gpus, config.least)
    return places(ray.nodes(), config.cpus_per_worker, use_gpu), use_gpu


def available_resources(config: ClusterConfig) -> Resources:
    """Find what a job starts with; refuse a cluster without room for it, for which Ray would wait for ever.

    Args:
        config: bounds of the number of workers, CPUs and accelerator of each.

    Returns:
        As many actors as fit now, within the bounds of `cluster.workers`.

    Raises:
        CapabilityError: the smallest number of workers does not fit.
    """
    count, use_gpu = fitting_workers(config)
    if count < config.least:
        cluster = ray.cluster_resources()
        each = f"{config.cpus_per_worker} CPUs{' and a GPU' if use_gpu else ''}"
        advice = f"; expected {f'at most {count}, or ' if count else ''}cluster.accelerator=cpu"
        raise CapabilityError(
            f"cluster.workers: {config.least} workers of {each}, the cluster has room for {count} "
            f"({cluster.get('CPU', 0):g} CPUs, {cluster.get('GPU', 0):g} GPUs){advice if use_gpu else ''}"
        )
    return Resources(min(config.most, count), config.cpus_per_worker, use_gpu)


def check_visible(folder: str, uri: str) -> None:
    """Refuse an MLflow store or a run folder that only this machine can see, if the cluster has others.

    Args:
        folder: of the run.
        uri: of the MLflow store.

    Raises:
        ConfigError: names the key.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    machines = {node["NodeManagerAddress"] for node in nodes}
    if len(machines) > 1 and uri.startswith("sqlite"):
        raise ConfigError(
            f"tracking.uri: {uri} is one machine's SQLite file and the cluster has {len(machines)} machines; "
            "expected the address of an MLflow server"
        )
    if len(machines) < 2 or not storage.is_local(folder):
        return
    probe = storage.join(folder, f"seen-{uuid.uuid4().hex}")
    storage.publish_bytes(probe, b"")
    exists = ray.remote(num_cpus=0)(storage.exists)
    on_node = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    seen = ray.get([exists.options(scheduling_strategy=strategy).remote(probe) for strategy in on_node])
    storage.remove(probe)
    if not all(seen):
        raise ConfigError(
            f"cluster.storage: {folder!r} is not the same folder on {seen.count(False)} of {len(nodes)} nodes; "
            "expected a shared folder, s3:// or gs://"
        )


@contextmanager
def stoppable(folder: str) -> Iterator[threading.Event]:
    """Turn SIGTERM and Ctrl-C into a request to save and end; the second one ends this process at once.

    Args:
        folder: in which the request is left for the workers.

    Returns:
        A context manager that gives an event, which is set once the request was made.

    Raises:
        KeyboardInterrupt: at the second signal.
    """
    requested = threading.Event()
    file = storage.join(folder, STOP)
    storage.remove(file)

    def request(number: int, _: object) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        name = signal.Signals(number).name
        log.warning("%s: saving a checkpoint and ending; send it again to end at once", name)
        storage.publish_bytes(file, b"")

    main = threading.current_thread() is threading.main_thread()  # no other thread can handle signals
    signals = (signal.SIGTERM, signal.SIGINT) if main else ()
    handlers = {number: signal.signal(number, request) for number in signals}
    try:
        yield requested
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        storage.remove(file)
