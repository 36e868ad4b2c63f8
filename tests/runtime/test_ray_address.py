"""RAY_ADDRESS: what is no address of a cluster ends in one line and in bounded time."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from pipeline.errors import ConfigError
from pipeline.runtime import ray_cluster
from pipeline.runtime.ray_cluster import check_answers, join


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "SOON_S", 1.0)
    monkeypatch.setattr(ray_cluster, "ANSWER_S", 0.3)


@pytest.fixture
def deaf() -> Iterator[str]:
    """A port that accepts connections and never answers, as of another service."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:8265", "is the dashboard's, for `ray job submit` alone; expected HOST:PORT"),
        ("somewhere", "'somewhere'; expected HOST:PORT of the head node"),
        ("somewhere:port", "'somewhere:port'; expected HOST:PORT of the head node"),
        ("tcp://somewhere:1", "'tcp://somewhere:1'; expected HOST:PORT of the head node"),
        (":6379", "':6379'; expected HOST:PORT of the head node"),
        ("127.0.0.1:1", "no cluster answers at '127.0.0.1:1'; expected HOST:PORT"),
        ("ray://127.0.0.1:1", "no cluster answers at 'ray://127.0.0.1:1'; expected HOST:PORT"),
    ],
)
def test_what_is_no_cluster(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^RAY_ADDRESS: .*{says}") as refused:
        join(address)
    assert "\n" not in str(refused.value)


def test_another_service(deaf: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS: no cluster answers at"):
        join(deaf)
    assert "no cluster answers" in caplog.text, "said before the end of the wait"


def test_a_server_of_the_protocol_is_not_held_up(caplog: pytest.LogCaptureFixture) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            check_answers(address)
    finally:
        server.stop(None).wait()
    assert not caplog.records
