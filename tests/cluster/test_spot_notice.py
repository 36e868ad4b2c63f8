"""The notice of a spot loss: read from a stand-in for the machine's metadata, passed on by a stand-in for `ray`."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "spot_notice.py"


class Metadata:
    """What a cloud tells a machine about itself; a notice as soon as `noticed` is set."""

    def __init__(self) -> None:
        self.noticed = False
        self.looks = 0
        self.address = ""

    def page(self, method: str, path: str, headers: dict[str, str]) -> str | None:
        if (method, path) == ("PUT", "/latest/api/token"):
            return "secret" if "x-aws-ec2-metadata-token-ttl-seconds" in headers else None
        self.looks += 1
        if path == "/computeMetadata/v1/instance/preempted" and headers.get("metadata-flavor") == "Google":
            return "TRUE\n" if self.noticed else "FALSE\n"
        granted = headers.get("x-aws-ec2-metadata-token") == "secret"
        if path == "/latest/meta-data/spot/instance-action" and granted and self.noticed:
            end = datetime.now(UTC) + timedelta(seconds=120)
            return json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"})
        return None


@contextmanager
def served(metadata: Metadata) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            page = metadata.page(self.command, self.path, headers)
            self.send_response(404 if page is None else 200)
            self.end_headers()
            self.wfile.write((page or "").encode())

        do_GET = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    metadata.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("cloud", "least", "most"), [("ec2", 100, 120), ("gce", 30, 30)])
def test_a_notice_drains_the_node(tmp_path: Path, cloud: str, least: int, most: int) -> None:
    """Ray refuses the message once, as while its head restarts; it is told again."""
    words = tmp_path / "words"
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" >> {words}\n[ $(wc -l < {words}) -gt 1 ]\n')
    ray.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    code = f"import runpy, sys; sys.argv[0] = {str(SCRIPT)!r}; import time; s = time.sleep; "
    code += "time.sleep = lambda seconds: s(seconds / 50); runpy.run_path(sys.argv[0], run_name='__main__')"
    metadata = Metadata()
    with served(metadata):
        command = [sys.executable, "-c", code, cloud, metadata.address]
        watcher = subprocess.Popen(command, env=environment)
        try:
            deadline = time.monotonic() + 60
            while metadata.looks < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert not words.exists(), "no notice, no draining"
            second = subprocess.run(command, env=environment, timeout=60, capture_output=True, text=True)
            assert second.stdout == "another process waits for the notice already\n"
            metadata.noticed = True
            assert watcher.wait(timeout=60) == 0
        finally:
            watcher.kill()
            watcher.wait()
    calls = words.read_text().splitlines()
    assert len(calls) == 2
    for call in calls:
        words_of = call.split()
        assert words_of[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        assert least <= int(words_of[-1]) <= most


def test_another_cloud_is_refused() -> None:
    ended = subprocess.run([sys.executable, SCRIPT, "azure"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "ec2|gce" in ended.stderr
