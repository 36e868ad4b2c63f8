"""A cluster of several nodes, all of them on this machine, whose nodes can be lost and added."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import pytest
from ray.cluster_utils import Cluster


class Nodes:
    """A head without CPUs and worker nodes of one CPU each."""

    def __init__(self, count: int):
        self.count = count
        self.workers: list[Any] = []

    def __enter__(self) -> Self:
        self._patch = pytest.MonkeyPatch()
        # Sockets need a short path; and no other Ray of this machine may take this cluster for its own.
        self._folder = tempfile.mkdtemp(prefix="nodes-", dir="/tmp")
        self._patch.setenv("RAY_TMPDIR", self._folder)
        self._patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *_path()]))
        try:
            self._cluster = Cluster()
            self._cluster.add_node(num_cpus=0, include_dashboard=False)
            for _ in range(self.count):
                self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster.shutdown()
        self._patch.undo()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a job needs to join."""
        mine = {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH")}
        return {**mine, "RAY_ADDRESS": self._cluster.address, "RAY_TMPDIR": self._folder}

    def add(self) -> None:
        """One more node."""
        self.workers.append(self._cluster.add_node(num_cpus=1))

    def announce(self, index: int, seconds: int) -> None:
        """Tell Ray that a node will be preempted, as a cloud's autoscaler does."""
        node = ["--address", self._cluster.address, "--node-id", self.workers[index].node_id]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        line = [Path(sys.executable).parent / "ray", "drain-node", *node, *why]
        subprocess.run([*line, "--deadline-remaining-seconds", str(seconds)], check=True, timeout=60)

    def lose(self, index: int) -> float:
        """SIGKILL to everything on a node; when."""
        now = time.monotonic()
        self._cluster.remove_node(self.workers.pop(index), allow_graceful=False)
        return now


def _path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
