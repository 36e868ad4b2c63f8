"""A job on a cluster that has no worker node yet: nodes are requested, waited for, and used."""

import json
from pathlib import Path

import pytest
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray._raylet import GcsClient

from tests.support.launched import LaunchedJob
from tests.support.nodes import Nodes
from tests.support.tiny_runs import tiny


def requested(nodes: Nodes) -> object:
    """What Ray's autoscaler is asked for."""
    client = GcsClient(address=nodes.environment["RAY_ADDRESS"])
    return json.loads(client.internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL, None) or "null")


@pytest.mark.slow
def test_nodes_are_requested_and_waited_for(tmp_path: Path) -> None:
    with Nodes(0) as nodes:
        none = tiny(tmp_path, "none", cluster={"workers": 1, "wait_s": 2.0})
        with LaunchedJob("pretrain", none, tmp_path, environment=nodes.environment) as job:
            assert job.process.wait(120) == 1
            job.wait_for(
                r"error: cluster.workers: 1 workers of 1 CPUs, the cluster has room for 0 \(0 CPUs, 0 GPUs\)"
            )
        assert requested(nodes) == []  # withdrawn

        late = tiny(tmp_path, "late", cluster={"workers": {"min": 1, "max": 3}, "wait_s": 120.0})
        with LaunchedJob("pretrain", late, tmp_path, environment=nodes.environment) as job:
            job.wait_for(
                r"room for 0 of 1 workers: nodes are requested; waiting up to 120 s \(cluster.wait_s\)"
            )
            assert requested(nodes) == [{"CPU": 1}] * 3
            nodes.add()
            assert "validation perplexity" in job.finish()
        assert requested(nodes) == []
