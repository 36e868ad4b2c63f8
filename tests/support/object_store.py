"""A server of the S3 protocol (moto) behind a proxy that fails on demand, as real stores do."""

import http.client
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import boto3
from moto.server import ThreadedMotoServer

_XML = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>planted</Message></Error>"
PLANTED = {500: "InternalError", 501: "NotImplemented", 503: "SlowDown", 403: "AccessDenied"}


@dataclass
class Fault:
    """A failure of the next requests whose "METHOD /path?query" matches.

    Attributes:
        pattern: regular expression.
        answer: HTTP status; 0 closes the connection after half of the body.
        times: number of requests that fail.
    """

    pattern: str
    answer: int
    times: int


@dataclass
class Store:
    """The proxy, as tests control it.

    Attributes:
        address: its URL.
        faults: failures to come; tests add to them.
        requests: "METHOD /path?query" of all requests so far.
    """

    address: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def seen(self, pattern: str) -> int:
        """Count the requests so far that match."""
        return sum(re.search(pattern, line) is not None for line in self.requests)


def _handler(store: Store, behind: tuple[str, int]) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()
    conditional = (
        threading.Lock()
    )  # moto itself checks a condition and writes in two steps, unlike real stores

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            line = f"{self.command} {self.path}"
            with lock:
                store.requests.append(line)
                fault = next((f for f in store.faults if f.times and re.search(f.pattern, line)), None)
                if fault:
                    fault.times -= 1
            length = int(self.headers.get("Content-Length") or 0)
            if fault:  # after half of the body, which is discarded
                self.rfile.read(length // 2)
                self.close_connection = True
                if fault.answer:
                    data = _XML.format(code=PLANTED[fault.answer]).encode()
                    self.send_response(fault.answer)
                    self.send_header("Content-Length", str(len(data)))
                    self.send_header("Connection", "close")
                    self.end_headers()
                    self.wfile.write(data if self.command != "HEAD" else b"")
                return
            connection, body = http.client.HTTPConnection(*behind), self.rfile.read(length)
            with conditional if "If-None-Match" in self.headers else nullcontext():
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in (
                    "connection",
                    "transfer-encoding",
                    "date",
                    "server",
                    "content-length",
                ):
                    self.send_header(name, value)
            given = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", given or str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        def log_message(self, *_: object) -> None:
            pass

    return Proxy


@contextmanager
def object_store(bucket: str) -> Iterator[Store]:
    """Run a store with one bucket; the environment names it and its credentials, as users set it."""
    moto = ThreadedMotoServer("127.0.0.1", 0)
    moto.start()
    host, port = moto.get_host_and_port()
    store = Store("")
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(store, (host, int(port))))
    proxy.daemon_threads = True
    store.address = f"http://127.0.0.1:{proxy.server_address[1]}"
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": store.address,
        "AWS_ACCESS_KEY_ID": "planted-key",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # no retries by the driver: the pipeline's own are tested
    }
    with mock.patch.dict(os.environ, environment):
        boto3.client("s3").create_bucket(Bucket=bucket)
        try:
            yield store
        finally:
            proxy.shutdown()
            proxy.server_close()
            moto.stop()
