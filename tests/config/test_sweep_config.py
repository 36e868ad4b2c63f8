"""Sweeps' files: which variants a space means, and what is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import dump, parse
from pipeline.config.sweep import Sweep, load_sweep
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted((CONFIGS / "sweep").glob("*.yaml"))


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """`write(key=value)` -> file of a sweep over a small run, with these keys of its own."""
    train = {"steps": 40, "validate_every": 10, "checkpoint_every": 10}
    base = parse(
        {
            "name": "base",
            "data": {"length": 16},
            "optim": {"warmup_steps": 2},
            "train": train,
            "sampling": {"steps": 8},
        },
        origin="test",
    )
    (tmp_path / "base.yaml").write_text(dump(base))

    def make(**own: Any) -> Path:
        file = tmp_path / "sweep.yaml"
        default = {
            "name": "swept",
            "base": "base.yaml",
            "space": {"model.swap.norm": {"grid": ["layer", "rms"]}},
        }
        file.write_text(yaml.safe_dump(default | own, sort_keys=False))
        return file

    return make


SWAP = {
    "model.swap.pooling": {"grid": ["none", "mean", "logsumexp"]},
    "model.swap.positional": {"grid": [True, False]},
}


def labels(sweep: Sweep) -> list[str]:
    return [variant.label for variant in sweep.variants()]


def test_grid_is_the_product_in_order(write: Any) -> None:
    sweep = load_sweep(write(space=SWAP))
    assert labels(sweep) == [
        f"pooling={pooling} positional={positional}"
        for pooling in ("none", "mean", "logsumexp")
        for positional in ("true", "false")
    ]
    trial = sweep.trial(sweep.variants()[3], 5)
    assert (trial.model.swap.pooling, trial.model.swap.positional, trial.seed) == ("mean", False, 5)
    assert trial.train.steps == 40


def test_one_at_a_time_changes_one_choice_of_the_first(write: Any) -> None:
    sweep = load_sweep(write(space=SWAP, search="one_at_a_time"))
    assert labels(sweep) == ["default", "pooling=mean", "pooling=logsumexp", "positional=false"]
    assert sweep.variants()[3].values == {"model.swap.pooling": "none", "model.swap.positional": False}


def test_a_group_sets_keys_together_and_holds_entries_of_its_own(write: Any) -> None:
    split = {
        "even": {"model.encoder_blocks": 2, "model.decoder_blocks": 2},
        "deep": {"model.encoder_blocks": 3, "model.decoder_blocks": {"grid": [1, 2]}},
    }
    sweep = load_sweep(write(space={"split": {"grid": split}}))
    found = [
        (v.label, sweep.trial(v, 0).model.encoder_blocks, sweep.trial(v, 0).model.decoder_blocks)
        for v in sweep.variants()
    ]
    assert found == [
        ("split=even", 2, 2),
        ("split=deep decoder_blocks=1", 3, 1),
        ("split=deep decoder_blocks=2", 3, 2),
    ]


def test_draws_stay_in_their_ranges_and_more_of_them_begin_with_the_same(write: Any) -> None:
    space = {
        "optim.lr": {"loguniform": [1e-4, 1e-1]},
        "train.ema": {"uniform": [0.5, 0.9]},
        "model.swap.norm": {"choice": ["layer", "rms"]},
    }
    few, many = (
        load_sweep(write(space=space, search="random", num_samples=n, seeds=[3])).variants() for n in (5, 40)
    )
    assert many[:5] == few
    rates = [float(variant.values["optim.lr"]) for variant in many]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert 8 <= sum(rate < 10**-2.5 for rate in rates) <= 32  # half of it in the logarithm
    assert all(0.5 <= variant.values["train.ema"] <= 0.9 for variant in many)
    assert {variant.values["model.swap.norm"] for variant in many} == {"layer", "rms"}


def test_names_are_folders_that_differ(write: Any) -> None:
    long = {f"v{i}": {"model.swap.norm": "rms", "optim.lr": 0.1 + i} for i in range(3)}
    sweep = load_sweep(write(space={"x" * 80: {"grid": long}}))
    names = [sweep.trial(variant, 0).name for variant in sweep.variants()]
    assert len(set(names)) == 3
    assert names == [
        load_sweep(write(space={"x" * 80: {"grid": long}})).trial(v, 0).name for v in sweep.variants()
    ]


def test_words_reach_the_sweep_or_all_its_runs(write: Any) -> None:
    sweep = load_sweep(
        write(overrides={"train.steps": 60}), ["seeds=[4, 5]", "train.steps=30", "optim.lr=0.5"]
    )
    assert sweep.config.seeds == (4, 5)
    assert (sweep.base().train.steps, sweep.base().optim.lr) == (30, 0.5)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"space": {"train.stepz": {"grid": [1]}}}, "train.stepz: no such key in train; did you mean 'steps'"),
        ({"space": {"model.swap.norm": {"grid": []}}}, "space.model.swap.norm: [] has no values"),
        ({"space": {"model.swap.norm": {"grid": ["rmz"]}}}, "model.swap.norm: 'rmz' is not one of layer, rms"),
        ({"space": {"model.swap.norm": {"gird": ["rms"]}}}, "no such kind; did you mean 'grid'"),
        ({"space": {"model.swap.norm": {"grid": ["rms", "rms"]}}}, "rms is listed twice"),
        ({"space": {"optim.lr": {"uniform": [0.1, 1]}}}, "uniform with search grid; expected grid"),
        ({"space": {}}, "space: empty"),
        ({"seeds": []}, "seeds: empty"),
        ({"metric": "validation/perplexty"}, "is never reported; reported are validation/perplexity"),
        ({"overrides": {"model.swap.norm": "rms"}}, "norm: model.swap.norm is also given by space"),
        ({"overrides": {"seed": 1}}, "seed is the sweep's own; expected seeds"),
        ({"base": "bass.yaml"}, "bass.yaml' does not exist; did you mean 'base.yaml'"),
        ({"search": "random", "space": {"optim.lr": {"uniform": [0.1, 1]}}}, "num_samples: missing"),
        (
            {"search": "random", "num_samples": 2, "space": {"optim.lr": {"loguniform": [0, 1]}}},
            "expected [low, high] with low < high, both above 0",
        ),
        ({"scheduler": "asha"}, "first_rung: None; expected the step of the first comparison"),
        ({"scheduler": "asha", "first_rung": 16}, "no multiple of train.validate_every 10; nearest that is: 20"),
        ({"overrides": {"train.checkpoint_every": 20}}, "trials are judged where they save"),
        ({"serch": "grid"}, "serch: no such key at the top level; did you mean 'search'"),
    ],
)  # fmt: skip
def test_what_is_refused(write: Any, own: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_sweep(write(**own))
    assert says in str(error.value)


def test_all_problems_are_told_at_once(write: Any) -> None:
    space = {"train.stepz": {"grid": [1]}, "model.swap.norm": {"grid": []}}
    with pytest.raises(ConfigError) as error:
        load_sweep(write(space=space, seeds=[], metric="validation/loss"))
    assert str(error.value).splitlines()[0].endswith("4 problems")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_sweep_loads(file: Path) -> None:
    sweep = load_sweep(file)
    assert len(sweep.variants()) >= 3
    assert file.read_text().startswith("# What")


def test_the_sweeps_are_there() -> None:
    assert {file.name for file in FILES} >= {"groupswap.yaml", "lr_quickstart.yaml", "quickstart.yaml"}


def test_groupswap_splits_blocks_at_matched_parameters() -> None:
    """The default and the other splits differ by the biases and gains of a block, no more."""
    import torch

    from pipeline.models import build

    sweep = load_sweep(CONFIGS / "sweep" / "groupswap.yaml")
    sizes = {}
    for variant in sweep.variants():
        if variant.label == "default" or variant.label.startswith("split="):
            with torch.device("meta"):
                model = build(sweep.trial(variant, 0).model, 257, 64)
            sizes[variant.label] = sum(value.numel() for value in model.parameters())
    assert len(sizes) == 3
    assert max(sizes.values()) / min(sizes.values()) < 1.001
