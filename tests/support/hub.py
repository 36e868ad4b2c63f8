"""A server of the few endpoints of the Hugging Face hub that downloads and uploads of models need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN, ACCOUNT = "hf_secret", "someone"
Files = dict[str, bytes]


@dataclass
class Repository:
    """A model repository.

    Attributes:
        branches: files of every branch by path, by the branch's name.
        private: seen with the token alone.
    """

    branches: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    private: bool = False

    def commit(self, revision: str) -> tuple[str, Files] | None:
        """Commit and files of a branch or of a commit."""
        for name, files in self.branches.items():
            commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        return None


@dataclass
class Hub:
    """The server, as tests control it.

    Attributes:
        address: its URL.
        repositories: by OWNER/NAME.
        requests: "METHOD /path" of all requests so far.
        failing: answers everything with this status instead.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failing: int | None = None

    def add(self, name: str, files: Files, revision: str = "main") -> None:
        """Set the files of a branch."""
        self.repositories.setdefault(name, Repository()).branches[revision] = files


def use(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Give this process the settings that HF_ENDPOINT and HF_HOME give a new one, and no token."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{{template[2]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def files_of(folder: Path, prefix: str = "") -> Files:
    """The files of a local folder, as `Hub.add` takes them."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {prefix + path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: object, status: int = 200, **headers: str) -> None:
            self._answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

        def _refuse(self, code: str, status: int = 404) -> None:
            self._json({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if hub.failing:
                self._json({"error": "planted"}, hub.failing)
            elif path == "/api/whoami-v2":
                if signed_in:
                    self._json({"name": ACCOUNT, "type": "user", "orgs": [{"name": "lab"}]})
                else:
                    self._json({"error": "Invalid credentials"}, 401)
            elif path == "/api/repos/create":
                self._create(json.loads(body))
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif path.startswith("/api/models/"):
                owner, name, *rest = path.removeprefix("/api/models/").split("/")
                self._api(f"{owner}/{name}", rest, body, signed_in)
            elif path.startswith("/api/"):
                self._refuse("NotFound")
            else:
                owner, name, _, revision, *inner = path.lstrip("/").split("/")
                self._resolve(f"{owner}/{name}", revision, "/".join(inner), signed_in)

        do_GET = do_HEAD = do_POST = _serve

        def _create(self, wish: dict[str, object]) -> None:
            name = f"{wish.get('organization') or ACCOUNT}/{wish['name']}"
            if name in hub.repositories:
                self._json({"error": "exists", "url": f"{hub.address}/{name}"}, 409)
                return
            hub.repositories[name] = Repository(
                private="private" in (wish.get("visibility"), wish.get("private") and "private")
            )
            self._json({"url": f"{hub.address}/{name}", "name": name})

        def _find(self, name: str, signed_in: bool) -> Repository | None:
            repository = hub.repositories.get(name)
            if repository is None or (repository.private and not signed_in):
                self._refuse("RepoNotFound", 401)
                return None
            return repository

        def _api(self, name: str, rest: list[str], body: bytes, signed_in: bool) -> None:
            repository = self._find(name, signed_in)
            if repository is None:
                return
            if rest == ["refs"]:
                refs = [
                    {"name": n, "ref": f"refs/heads/{n}", "targetCommit": "0" * 40}
                    for n in repository.branches
                ]
                self._json({"branches": refs, "tags": [], "converts": []})
            elif rest[:1] == ["preupload"]:
                wish = json.loads(body)["files"]
                modes = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in wish
                ]
                self._json({"files": modes})
            elif rest[:1] == ["commit"]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        repository.branches["main"][line["value"]["path"]] = content
                self._json({"commitOid": "0" * 40, "commitUrl": f"{hub.address}/{name}/commit/{'0' * 40}"})
            else:
                found = repository.commit("/".join(rest[1:]) if rest[:1] == ["revision"] else "main")
                if found is None:
                    self._refuse("RevisionNotFound")
                    return
                siblings = [{"rfilename": file} for file in found[1]]
                self._json({"id": name, "sha": found[0], "siblings": siblings})

        def _resolve(self, name: str, revision: str, inner: str, signed_in: bool) -> None:
            repository = self._find(name, signed_in)
            if repository is None:
                return
            found = repository.commit(revision)
            if found is None or inner not in found[1]:
                self._refuse("EntryNotFound" if found else "RevisionNotFound")
                return
            commit, files = found
            etag = hashlib.sha256(files[inner]).hexdigest()
            self._answer(200, files[inner], ETag=f'"{etag}"', X_Repo_Commit=commit)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run the server on a port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
