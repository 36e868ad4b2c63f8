"""Configs that build on others: what is inherited, what is replaced, and what is refused."""

from pathlib import Path

import pytest
import yaml

from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import dump, load, parse, parse_section, read_tree
from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.config.sweep import load_sweep
from pipeline.errors import ConfigError

BASE = """
name: base
seed: 3
data: {length: 64}
model: {kind: pgm, hidden: 64, heads: 4, swap: {pooling: mean}}
optim: {betas: [0.8, 0.9], warmup_steps: 10}
train: {steps: 100, batch: 8}
sampling: {steps: 32, labels: null}
"""


def write(folder: Path, **texts: str) -> Path:
    """Write NAME.yaml files; returns the path of the last one."""
    for name, text in texts.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file


class TestInheritance:
    def test_keys_merge_at_every_depth(self, tmp_path: Path) -> None:
        file = write(
            tmp_path,
            base=BASE,
            own="base: base.yaml\nname: own\nmodel: {swap: {norm: rms}}\ntrain: {batch: 16}",
        )
        config, base = load(file), load(tmp_path / "base.yaml")
        assert isinstance(config.model, PGMConfig)
        assert (config.model.swap.norm, config.model.swap.pooling, config.model.hidden) == ("rms", "mean", 64)
        assert (config.train.batch, config.train.steps, config.seed) == (16, 100, 3)
        own = {"name": "base", "model": base.model, "train": base.train}
        assert config.model_copy(update=own) == base

    def test_lists_and_values_replace(self, tmp_path: Path) -> None:
        text = "base: base.yaml\nname: own\noptim: {betas: [0.5, 0.6]}\ndata: {path: x}"
        config = load(write(tmp_path, base=BASE, own=text))
        assert config.optim.betas == (0.5, 0.6)
        assert (config.data.path, config.data.length) == ("x", 64)

    def test_null_takes_the_place_of_what_is_inherited(self, tmp_path: Path) -> None:
        text = "base: base.yaml\nname: own\nmodel: null\noptim: {warmup_steps: 5}"
        config = load(write(tmp_path, base=BASE, own=text))
        assert "model" not in config.model_fields_set
        assert config.model == PGMConfig()

    def test_another_model_kind_replaces_the_section(self, tmp_path: Path) -> None:
        text = "base: base.yaml\nname: own\nmodel: {kind: mdlm, blocks: 3}"
        model = load(write(tmp_path, base=BASE, own=text)).model
        assert isinstance(model, MDLMConfig)
        assert (model.blocks, model.hidden) == (3, 768)

    def test_the_same_kind_written_again_is_no_change(self, tmp_path: Path) -> None:
        text = "base: base.yaml\nname: own\nmodel: {kind: pgm, heads: 2}\ndata: {kind: text, wrap: bos_eos}"
        config = load(write(tmp_path, base=BASE, own=text))
        assert (config.model.heads, config.model.hidden) == (2, 64)
        assert (config.data.length, config.data.predicted) == (64, 63)

    def test_another_data_kind_replaces_the_section(self, tmp_path: Path) -> None:
        """Data without a kind is text."""
        text = "base: base.yaml\nname: own\ndata: {kind: image}\nsampling: {steps: 8}"
        data = load(write(tmp_path, base=BASE, own=text)).data
        assert (data.kind, data.length) == ("image", 17)

    def test_bases_chain_and_paths_start_at_the_file_that_names_them(self, tmp_path: Path) -> None:
        write(tmp_path / "a", base=BASE)
        write(tmp_path / "b", middle="base: ../a/base.yaml\nname: middle\nmodel: {kind: mdlm, blocks: 2}")
        file = write(tmp_path, own="base: b/middle.yaml\nname: own\nmodel: {kind: pgm}\ntrain: {batch: 24}")
        config = load(file)
        assert config.model == PGMConfig(kind="pgm"), "the base's own PGM is behind the change of kind"
        assert (config.train.batch, config.train.steps) == (24, 100)
        absolute = write(tmp_path / "c", own=f"base: {file}\nname: other")
        assert load(absolute).train == config.train

    def test_overrides_come_last(self, tmp_path: Path) -> None:
        file = write(tmp_path, base=BASE, own="base: base.yaml\ntrain: {batch: 16}")
        config = load(file, ["name=word", "train.batch=32", "model.swap.pooling=none"])
        assert (config.name, config.train.batch, config.train.steps) == ("word", 32, 100)
        assert isinstance(config.model, PGMConfig)
        assert config.model.swap.pooling == "none"

    def test_what_is_dumped_needs_no_base(self, tmp_path: Path) -> None:
        """Run folders hold this text."""
        config = load(write(tmp_path, base=BASE, own="base: base.yaml\nname: own\ntrain: {batch: 16}"))
        tree = yaml.safe_load(dump(config))
        assert "base" not in tree
        assert tree["train"]["steps"] == 100
        assert parse(tree, origin="dump") == config


class TestRefusals:
    def test_a_name_is_not_inherited(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"1 problem\n  name: missing; every config needs its own"):
            load(write(tmp_path, base=BASE, own="base: base.yaml"))

    def test_a_missing_base_names_the_nearest(self, tmp_path: Path) -> None:
        file = write(tmp_path, base=BASE, own="base: bass.yaml\nname: own")
        with pytest.raises(ConfigError) as error:
            load(file)
        assert str(error.value).startswith(f"{file}: base: config file ")
        assert str(error.value).endswith("bass.yaml' does not exist; did you mean 'base.yaml'?")

    def test_a_cycle(self, tmp_path: Path) -> None:
        file = write(
            tmp_path, a="base: b.yaml\nname: a", b="base: sub/../c.yaml\nname: b", c="base: b.yaml\nname: c"
        )
        (tmp_path / "sub").mkdir()
        with pytest.raises(ConfigError, match=r"c\.yaml: base: .*b\.yaml: base: .*c\.yaml' builds on itself"):
            load(file)
        with pytest.raises(ConfigError, match="builds on itself"):
            load(write(tmp_path, own="base: own.yaml\nname: own"))

    @pytest.mark.parametrize("written", ["3", "[base.yaml]", "{file: base.yaml}"])
    def test_a_base_that_is_no_path(self, tmp_path: Path, written: str) -> None:
        with pytest.raises(ConfigError, match=r"base: .*; expected the path of a config file"):
            load(write(tmp_path, own=f"base: {written}\nname: own"))

    def test_a_base_that_is_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"own\.yaml: base: config file .*base\.yaml' holds a list"):
            load(write(tmp_path, base="[1]", own="base: base.yaml\nname: own"))

    def test_as_an_override(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="base: stands in config files only"):
            load(write(tmp_path, base=BASE), ["base=base.yaml"])

    def test_wrong_keys_of_the_base_are_named(self, tmp_path: Path) -> None:
        file = write(tmp_path, base="name: base\ntrain: {stpes: 3}", own="base: base.yaml\nname: own")
        with pytest.raises(ConfigError, match=r"train\.stpes: no such key in train; did you mean 'steps'"):
            load(file)


class TestOtherConfigs:
    def test_a_sweep_over_a_composed_run(self, tmp_path: Path) -> None:
        every = "train: {validate_every: 10, checkpoint_every: 10}"
        file = write(
            tmp_path,
            base=BASE,
            run=f"base: base.yaml\nname: run\n{every}",
            sweep="name: swept\nbase: run.yaml\nspace: {model.swap.norm: {grid: [layer, rms]}}",
        )
        sweep = load_sweep(file)
        assert sweep.base().train.steps == 100
        assert [sweep.trial(v, 0).model.swap.norm for v in sweep.variants()] == ["layer", "rms"]
        assert sweep.config.base == "run.yaml"

    def test_a_sweep_over_a_sweep(self, tmp_path: Path) -> None:
        space = "{model.swap.norm: {grid: [layer, rms]}}"
        overrides = "{train.steps: 50, train.validate_every: 10, train.checkpoint_every: 10}"
        write(
            tmp_path,
            base=BASE,
            sweep=f"name: swept\nbase: base.yaml\nseeds: [1]\nspace: {space}\noverrides: {overrides}",
        )
        text = "name: own\nbase: sweep.yaml\noverrides: {train.steps: 60}\n"
        text += "space: {model.swap.pooling: {grid: [none]}}"
        sweep = load_sweep(write(tmp_path, own=text))
        assert (sweep.config.name, sweep.config.seeds) == ("own", (1,))
        assert (sweep.base().train.steps, sweep.base().train.validate_every) == (60, 10)
        assert len(sweep.variants()) == 2
        with pytest.raises(ConfigError, match="name: missing"):
            load_sweep(write(tmp_path, own="base: sweep.yaml"))

    def test_another_base_for_a_sweep(self, tmp_path: Path) -> None:
        every = "{validate_every: 10, checkpoint_every: 10}"
        file = write(
            tmp_path,
            base=BASE,
            other=f"base: base.yaml\nname: other\ntrain: {every}\nseed: 4",
            sweep="name: swept\nbase: base.yaml\nspace: {model.swap.norm: {grid: [layer, rms]}}",
        )
        with pytest.raises(ConfigError, match="trials are judged where they save"):
            load_sweep(file)
        assert load_sweep(file, ["base=other.yaml"]).base().seed == 4

    def test_a_sweep_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="base: missing"):
            load_sweep(write(tmp_path, sweep="name: swept\nspace: {model.swap.norm: {grid: [rms]}}"))

    def test_a_benchmark(self, tmp_path: Path) -> None:
        models = "{a: {kind: pgm, hidden: 32, heads: 2}, b: {kind: mdlm, hidden: 32, heads: 2}}"
        file = write(
            tmp_path,
            base=f"name: base\nmodels: {models}\ntraining: [{{model: a}}]\nsteps: 8",
            own="base: base.yaml\nname: own\nmodels: {a: {heads: 4}, b: {kind: ar}}\ntraining: [{model: b}]",
        )
        config = parse_section(BenchmarkConfig, read_tree(file), str(file))
        assert (config.models["a"].hidden, config.models["a"].heads) == (32, 4)
        assert (config.models["b"].kind, config.models["b"].hidden) == ("ar", 768)
        assert [case.model for case in config.training] == ["b"]
        assert config.steps == 8
