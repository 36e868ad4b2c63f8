"""Models by name: paths, and names of the Hugging Face hub, wherever a model can be named."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.plan import teacher_model
from pipeline.api import load_model
from pipeline.config.model import LoraConfig
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import TokenizerInfo
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models import build, model_folder
from pipeline.run import Run
from pipeline.training import distillation, resume
from tests.support.hub import Hub, files_of, running_hub, use
from tests.support.small_manifest import small_manifest
from tests.support.small_models import PGM, randomised

RELEASED = Path(__file__).parent / "data" / "pgm_learn_freqs.safetensors"
FILE = "hf:jdeschena/pgm/owt/pgm.safetensors"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a released file, and a model folder of ours."""
    folder = tmp_path_factory.mktemp("model")
    facts = model_folder.DataFacts(257, 16, None, 256)
    tensors = randomised(PGM, 257).state_dict()
    model_folder.write(folder, PGM, facts, tensors, model_folder.Background())
    ByteTokenizer().save(folder)
    with running_hub() as server:
        server.add("jdeschena/pgm", {"owt/pgm.safetensors": RELEASED.read_bytes()})
        server.add("me/ours", files_of(folder))
        yield server


@pytest.fixture(autouse=True)
def hub(running: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    use(monkeypatch, running.address, tmp_path / "home")
    return running


def config(storage: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "r", "cluster": {"storage": str(storage)}, **sections})


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_python_interface() -> None:
    model, local = load_model(FILE, overrides=["bos=3"]), load_model(RELEASED)
    assert model.bos == 3
    assert equal(model.denoiser.state_dict(), local.denoiser.state_dict())
    ours = load_model("hf:me/ours@main")
    assert ours.infill("a[[2]]")[0].startswith("a")
    with pytest.raises(CheckpointError, match=r"did you mean 'owt/pgm\.safetensors'"):
        load_model("hf:jdeschena/pgm/pgm.safetensor")
    with pytest.raises(ConfigError, match=r"hf:jdeschena'; expected hf:OWNER/NAME/FILE"):
        load_model("hf:jdeschena")


@pytest.mark.parametrize("name", [FILE, str(RELEASED), "hf:me/ours"])
def test_jobs_sample_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A model folder that all nodes see is made once in the storage; the second job needs no hub."""
    run = Run.of(config(tmp_path, sampling={"model": name}))
    folder = Path(run.sampled_model())
    assert folder.parent == tmp_path / "imported"
    assert equal(load_model(folder).denoiser.state_dict(), load_model(name).denoiser.state_dict())
    assert isinstance(load_model(folder).tokenizer, ByteTokenizer) == (name == "hf:me/ours")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    assert run.sampled_model() == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_training_starts_from_a_name(tmp_path: Path) -> None:
    run = Run(config(tmp_path, train={"init_from": FILE}))
    resume.precheck(run)
    local = load_model(RELEASED).denoiser
    model = build(_section(), local.vocab_size, local.length)
    weights = resume.initial_weights(run, model)
    assert weights is not None
    assert equal(weights[0], local.state_dict())
    missing = Run(config(tmp_path, train={"init_from": "hf:jdeschena/pgm/owt/pgm.ckpt"}))
    with pytest.raises(CheckpointError, match=r"no file 'owt/pgm\.ckpt'"):
        resume.precheck(missing)


def test_adapters_are_trained_on_a_name_of_the_hub(tmp_path: Path) -> None:
    """The weights are those of the hub, frozen, and the adapter starts without effect."""
    lora = LoraConfig(rank=2)
    run = Run(
        config(tmp_path, train={"init_from": "hf:me/ours"}, model=PGM.model_copy(update={"lora": lora}))
    )
    resume.precheck(run)
    tokenizer = TokenizerInfo(name="bytes", hash=ByteTokenizer().hash)
    run = run.replace(given_manifest=small_manifest(length=16, tokenizer=tokenizer))
    model, ours = build(PGM, 257, 16), load_model("hf:me/ours").denoiser.state_dict()
    assert len(resume.adapt_base(run, model, lora, None)) == 64
    state, trained = model.state_dict(), {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == state.keys() - ours.keys()
    assert trained
    assert equal({name: state[name] for name in ours}, ours)


def _section() -> Any:
    from pipeline.models.released import conversion

    return conversion.load(RELEASED)[1].model


def test_a_distillation_records_the_commit_of_its_teacher(tmp_path: Path) -> None:
    settings = {"distill": {"teacher": FILE, "rounds": 1, "teacher_steps": 2}, "train": {"steps": 5000}}
    run = distillation.with_teacher(
        Run.of(config(tmp_path, **settings, data={"length": 16}, sampling={"steps": 8}))
    )
    assert run.config.model == _section()
    origin = distillation.read_origin(run.folder)["teacher"]
    assert origin.startswith("hf:jdeschena/pgm@")
    assert origin.endswith("/owt/pgm.safetensors")
    with pytest.raises(ConfigError, match="a plan downloads no models"):
        teacher_model(FILE)


@pytest.mark.parametrize(
    "sections",
    [
        {"sampling": {"model": "hf:x"}},
        {"train": {"init_from": "hf:x"}},
        {"distill": {"teacher": "hf:x"}},
        {"evaluation": {"models": {"a": "hf:x"}}},
    ],
)
def test_names_of_another_form_are_refused_with_the_config(sections: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="'hf:x'; expected hf:OWNER/NAME/FILE or hf:OWNER/NAME@REVISION/FILE"
    ):
        RunConfig.model_validate({"name": "r", **sections})
