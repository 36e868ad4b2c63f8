"""Models of the Hugging Face hub by name, from a server of its protocol."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.config.location import HubName
from pipeline.errors import CheckpointError, ConfigError
from pipeline.storage import hub
from tests.support.hub import ACCOUNT, TOKEN, Hub, running_hub, use

RELEASED = {
    "pgm_8_8.ckpt": b"8",
    "owt/pgm_6_6.ckpt": b"6",
    "owt/mdlm/model.safetensors": b"m",
    "owt/mdlm/config.json": b"{}",
    "README.md": b"#",
}
OURS = {"model.safetensors": b"w", "config.yaml": b"c", "config.json": b"{}", "tokenizer_info.json": b"t"}


@pytest.fixture(scope="module")
def running() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


@pytest.fixture
def server(running: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub of this machine's settings, with two repositories and an empty cache."""
    use(monkeypatch, running.address, tmp_path)
    running.repositories.clear()
    running.failing = None
    running.add("jdeschena/pgm", RELEASED)
    running.add("jdeschena/pgm", {"pgm_8_8.ckpt": b"later"}, "step_20000")
    running.add("me/ours", {**OURS, "notes/paper.pdf": b"p"})
    running.requests.clear()
    return running


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("hf:a/b/c.ckpt", ("a/b", None, "c.ckpt")),
        ("hf:a/b", ("a/b", None, "")),
        ("hf:a/b/", ("a/b", None, "")),
        ("hf:a/b@v1.0", ("a/b", "v1.0", "")),
        ("hf:a/b@refs%2Fpr%2F1/d/e.pt", ("a/b", "refs/pr/1", "d/e.pt")),
        ("hf://a/b/d/e", ("a/b", None, "d/e")),
    ],
)
def test_names(name: str, parsed: tuple[str, str | None, str]) -> None:
    place = HubName.parse(name)
    assert (place.repository, place.revision, place.path) == parsed
    assert HubName.parse(place.at(place.revision, place.path)) == place


@pytest.mark.parametrize(
    "name", ["hf:", "hf:a", "hf:a/", "hf:a/b@/c", "hf:a/b/../c", "hf:a/b//c", "hf:a b/c"]
)
def test_names_of_another_form(name: str) -> None:
    with pytest.raises(ConfigError, match="expected hf:OWNER/NAME/FILE"):
        hub.fetch(name)


def test_a_file_is_downloaded_once(server: Hub) -> None:
    copy = hub.fetch("hf:jdeschena/pgm/owt/pgm_6_6.ckpt")
    assert copy.path.read_bytes() == b"6"
    commit = server.repositories["jdeschena/pgm"].commit("main")
    assert commit is not None
    assert copy.name == f"hf:jdeschena/pgm@{commit[0]}/owt/pgm_6_6.ckpt"
    server.requests.clear()
    assert hub.fetch(copy.name) == copy
    assert hub.fetch("hf:jdeschena/pgm/owt/pgm_6_6.ckpt") == copy
    assert not [line for line in server.requests if line.startswith("GET /jdeschena")]


def test_a_revision(server: Hub) -> None:
    assert hub.fetch("hf:jdeschena/pgm@step_20000/pgm_8_8.ckpt").path.read_bytes() == b"later"
    assert hub.fetch("hf:jdeschena/pgm/pgm_8_8.ckpt").path.read_bytes() == b"8"
    with pytest.raises(CheckpointError, match="no revision 'step_2000'; did you mean 'step_20000'"):
        hub.fetch("hf:jdeschena/pgm@step_2000/pgm_8_8.ckpt")


def test_folders(server: Hub) -> None:
    """One of ours comes whole, without its subfolders; one of released weights is its file, config beside."""
    ours = hub.fetch("hf:me/ours").path
    assert sorted(path.name for path in ours.iterdir()) == sorted(OURS)
    assert hub.fetch("hf:me/ours/model.safetensors").path == ours
    released = hub.fetch("hf:jdeschena/pgm/owt/mdlm")
    assert released.path.name == "model.safetensors"
    assert sorted(path.name for path in released.path.parent.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert hub.fetch("hf:jdeschena/pgm/owt/mdlm/model.safetensors") == released
    assert hub.fetch(released.name) == released


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:jdeschena/pgm/pgm_8_8.pt", "no file 'pgm_8_8.pt'; did you mean 'pgm_8_8.ckpt'"),
        ("hf:jdeschena/pgm/pgm_66.ckpt", "did you mean 'owt/pgm_6_6.ckpt'"),
        (
            "hf:jdeschena/pgm",
            "the repository has no model.safetensors; .*one of its files: pgm_8_8.ckpt, owt",
        ),
        ("hf:jdeschena/pgm/owt", "folder 'owt' has no model.safetensors; .*: owt/pgm_6_6.ckpt"),
        ("hf:jdeschena/pmg/a.ckpt", "no model repository 'jdeschena/pmg' .*or a private one, .*HF_TOKEN"),
    ],
)
def test_what_is_missing_is_named(server: Hub, name: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        hub.fetch(name)


def test_a_private_repository_needs_the_token(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["me/ours"].private = True
    with pytest.raises(CheckpointError, match="or a private one"):
        hub.fetch("hf:me/ours")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.fetch("hf:me/ours").path.is_dir()


@pytest.mark.parametrize("outage", ["no network", "server down", "offline mode"])
def test_without_the_hub(server: Hub, monkeypatch: pytest.MonkeyPatch, outage: str) -> None:
    """The cache answers; what it lacks is refused with what to download and where to put it."""
    names = ["hf:jdeschena/pgm/owt/pgm_6_6.ckpt", "hf:me/ours", "hf:jdeschena/pgm/owt/mdlm"]
    names += ["hf:jdeschena/pgm@step_20000/pgm_8_8.ckpt"]
    copies = [hub.fetch(name) for name in names]
    if outage == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif outage == "server down":
        server.failing = 503
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [hub.fetch(name) for name in names] == copies
    assert [hub.fetch(copy.name) for copy in copies] == copies
    with pytest.raises(CheckpointError) as caught:
        hub.fetch("hf:jdeschena/pgm/pgm_8_8.ckpt")
    message = str(caught.value)
    assert ("HF_HUB_OFFLINE" if outage == "offline mode" else "cannot be reached") in message
    assert "run `hf download jdeschena/pgm pgm_8_8.ckpt --local-dir FOLDER`" in message
    assert "by its path, FOLDER/pgm_8_8.ckpt" in message
    with pytest.raises(CheckpointError, match=r"'owt/new/\*' --revision v2 --local-dir.*FOLDER/owt/new;"):
        hub.fetch("hf:jdeschena/pgm@v2/owt/new")


def test_an_interrupted_download_is_no_copy(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights come last, so that a cache that has them has the rest."""
    hub.fetch("hf:me/ours")
    order = [line for line in server.requests if line.startswith("GET /me/ours")]
    assert order[-1].endswith("/model.safetensors")


def test_uploads(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file, content in OURS.items():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file).write_bytes(content)
    with pytest.raises(
        ConfigError, match="needs a token that may write; run `hf auth login`, or set HF_TOKEN"
    ):
        hub.check_upload(f"{ACCOUNT}/new")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="the hub refuses the token"):
        hub.check_upload(f"{ACCOUNT}/new")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="belongs to 'someone'; expected an owner of someone, lab; did you"):
        hub.check_upload("someon/new")
    with pytest.raises(ConfigError, match="'new'; expected OWNER/NAME"):
        hub.check_upload("new")
    for name in (f"{ACCOUNT}/new", "lab/new"):
        hub.check_upload(name)
        assert (
            hub.upload(tmp_path / "model", name, private=name.startswith("lab")) == f"{server.address}/{name}"
        )
        assert server.repositories[name].branches["main"] == OURS
        assert server.repositories[name].private == name.startswith("lab")
    hub.upload(tmp_path / "model", "lab/new", private=False)
    assert server.repositories["lab/new"].private, "an existing repository stays as it is"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"push: 'lab/new': http://127\.0\.0\.1:9: ConnectError"):
        hub.check_upload("lab/new")
