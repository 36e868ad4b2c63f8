"""jobs.convert: weights of any kind into a folder that loads bit-equal and can go to the hub."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.api import load_model
from pipeline.config.data import TextDataConfig
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.export import export_model
from pipeline.models import model_folder
from tests.support.hub import TOKEN, files_of, running_hub, use
from tests.support.in_process import run_job
from tests.support.launched import job_output
from tests.support.small_models import MDLM, PGM, random_rows, randomised

ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "tests" / "data" / "pgm_learn_freqs.safetensors"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A model folder as a run leaves it."""
    model = randomised(PGM, vocab_size=257)
    config = RunConfig(name="mine", model=PGM, data=TextDataConfig(source="pydoc"))
    figures = {"validation_perplexity": 23.456, "estimator": "count, 1 draw(s), EMA weights", "step": 100}
    background = model_folder.Background(figures, config.model_dump(mode="json"))
    facts = model_folder.DataFacts(257, 16, bos=None, eot=256)
    model_folder.write(tmp_path / "mine", PGM, facts, model.state_dict(), background)
    ByteTokenizer().save(tmp_path / "mine")
    return tmp_path / "mine"


def same(one: Path | str, other: Path | str) -> None:
    """Both models have the same bits, and the same answers."""
    models = [load_model(one), load_model(other)]
    states = [model.denoiser.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (models[0].bos, models[0].denoiser.length) == (models[1].bos, models[1].denoiser.length)
    tokens, groups = random_rows(2, 16, models[0].denoiser.vocab_size)
    assert torch.equal(models[0].logits(tokens, groups), models[1].logits(tokens, groups))


def test_released_weights_become_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(RELEASED, str(out), ["license=apache-2.0", "figures.validation_perplexity=22.61", "bos=3"])
    same(out, out / "model.safetensors")
    released, exported = load_model(RELEASED).denoiser.state_dict(), load_file(out / "model.safetensors")
    assert all(torch.equal(released[name], exported[name]) for name in released)
    assert load_model(out).bos == 3
    tree = yaml.safe_load((out / "config.yaml").read_text())
    assert tree["data"] == {"vocab_size": 32, "length": 16, "bos": 3}
    assert tree["figures"] == {"validation_perplexity": 22.61}
    assert "run" not in tree
    hub = json.loads((out / "config.json").read_text())
    assert (hub["model_type"], hub["hidden"], hub["vocab_size"]) == ("pgm", 32, 32)
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["library_name"]) == ("apache-2.0", "partition-pipeline")
    assert "| validation perplexity | 22.61 |" in card
    assert 'load_model("out")' in card
    assert "hf upload OWNER/out ." in card
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "config.yaml",
        "model.safetensors",
    ]


def test_a_run_s_model_keeps_its_figures_and_tokenizer(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(trained, str(out), ["figures.generative_perplexity=99.5"])
    same(trained, out)
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    card = (out / "README.md").read_text()
    assert "| validation perplexity | 23.46 |\n| estimator | count, 1 draw(s), EMA weights |" in card
    assert "| generative perplexity | 99.5 |" in card
    assert "To be filled in" in card, "no licence was named"
    tree = yaml.safe_load((out / "config.yaml").read_text())
    assert tree["run"]["data"]["source"] == "pydoc"
    assert not {"cluster", "tracking"} & tree["run"].keys(), "where a run kept its files is not published"
    model = load_model(out)
    assert model.tokenizer is not None
    assert model.decode(torch.tensor([[104, 105, 256]])) == ["hi"]
    export_model(out, str(tmp_path / "again"))
    same(out, tmp_path / "again")


def test_folders_of_earlier_versions_still_load(trained: Path) -> None:
    """They name the model in their run only."""
    expected = load_model(trained).denoiser.state_dict()
    path = trained / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({"run": tree["run"], "data": tree["data"]}))
    (trained / "config.json").unlink()
    assert all(torch.equal(v, expected[k]) for k, v in load_model(trained).denoiser.state_dict().items())


def test_a_masked_model(tmp_path: Path) -> None:
    facts = model_folder.DataFacts(11, 16, None, None)
    model_folder.write(tmp_path / "a", MDLM, facts, randomised(MDLM).state_dict(), model_folder.Background())
    export_model(tmp_path / "a", str(tmp_path / "b"))
    same(tmp_path / "a", tmp_path / "b")
    assert "none given" in (tmp_path / "b" / "README.md").read_text()


def test_what_is_not_a_model_is_not_replaced(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex; expected a new folder or a model's"):
        export_model(trained, str(tmp_path / "home"))
    assert (tmp_path / "home" / "thesis.tex").exists()
    export_model(trained, str(tmp_path / "out"), ["figures.a=1"])
    export_model(trained, str(tmp_path / "out"), ["figures.a=2"])
    assert "| a | 2 |" in (tmp_path / "out" / "README.md").read_text()


def test_wrong_words_and_damaged_folders(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"length=8.*overrides apply only to released weight files"):
        export_model(trained, out, ["length=8"])
    with pytest.raises(ConfigError, match="'licence=mit': no such key; did you mean 'license'"):
        export_model(RELEASED, out, ["licence=mit"])
    with pytest.raises(ConfigError, match="push: 'lab/pgm' needs a token"):
        export_model("/not/looked/for", out, ["push=lab/pgm"])
    with pytest.raises(ConfigError, match="'bytes' has 257 ids; expected the model's 32"):
        export_model(RELEASED, out, ["tokenizer=bytes"])
    (trained / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(trained)
    (trained / "config.yaml").write_text("model: [")
    with pytest.raises(CheckpointError, match="is not YAML"):
        load_model(trained)
    (trained / "config.yaml").write_text("run: {}")
    with pytest.raises(CheckpointError, match="expected the sections model and data"):
        load_model(trained)
    assert not Path(out).exists()


def test_the_command(tmp_path: Path) -> None:
    """From a name of the hub, and up to a repository of it."""
    with running_hub() as hub:
        hub.add("jdeschena/pgm", {"owt/pgm.safetensors": RELEASED.read_bytes()})
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        words = ["hf:jdeschena/pgm/owt/pgm.safetensors", str(tmp_path / "out"), "license=mit", "push=lab/pgm"]
        printed = job_output("convert", *words, **environment)
        assert f"uploaded   {hub.address}/lab/pgm" in printed
        assert hub.repositories["lab/pgm"].branches["main"] == files_of(tmp_path / "out")
        assert hub.repositories["lab/pgm"].private
    same(RELEASED, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"# lab/pgm\n\n.*Made from hf:jdeschena/pgm@[0-9a-f]{40}/owt/pgm\.safetensors\.", card)
    assert 'load_model("hf:lab/pgm")' in card
    usage = run_job("convert", str(RELEASED))
    assert (usage.code, "SOURCE FOLDER [key=value ...]" in usage.stdout) == (2, True)
    wrong = run_job("convert", str(tmp_path / "none.ckpt"), str(tmp_path / "out"))
    assert wrong.code == 1
    assert "Traceback" not in wrong.stderr
    assert "no such folder or file" in wrong.stderr
