"""YAML + overrides -> RunConfig: what is wrong is named, all of it at once, with the nearest right choice."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.config.evaluation import GRID_KEYS
from pipeline.config.load import dump, flatten, load, parse
from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
OTHERS = {"sweep", "benchmark"}  # files of another form
FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name not in OTHERS)


def problems(tree: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as error:
        parse({"name": "a", **tree}, origin="test")
    return str(error.value)


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


class TestMistakes:
    @pytest.mark.parametrize(
        ("tree", "says"),
        [
            ({"trian": {}}, "trian: no such key at the top level; did you mean 'train'?"),
            ({"train": {"stpes": 5}}, "train.stpes: no such key in train; did you mean 'steps'?"),
            (
                {"train": {"zzz": 5}},
                "train.zzz: no such key in train; known: activation_checkpointing, batch, ",
            ),
            (
                {"model": {"kind": "pgm", "encoder_block": 2}},
                "model.encoder_block: no such key in model; did",
            ),
            (
                {"model": {"kind": "pgm", "swap": {"positionl": True}}},
                "model.swap.positionl: no such key in model.swap; did you mean 'positional'?",
            ),
            ({"model": {"kind": "mdlm", "encoder_blocks": 2}}, "model.encoder_blocks: no such key in model"),
            ({"train": {"steps": "many"}}, "train.steps: 'many': input should be a valid integer"),
            ({"train": {"steps": 0}}, "train.steps: 0: input should be greater than 0"),
            ({"train": {"steps": 1.5}}, "train.steps: 1.5: input should be a valid integer"),
            (
                {"train": {"precision": "bf61"}},
                "train.precision: 'bf61' is not one of fp32, bf16; did you mean 'bf16'?",
            ),
            ({"train": {"zero_stage": 7}}, "train.zero_stage: 7 is not one of 0, 1"),
            (
                {"model": {"kind": "pmg"}},
                "model.kind: 'pmg' is not one of pgm, mdlm, ar; did you mean 'pgm'?",
            ),
            (
                {"model": {"kind": "pgm", "registers": 3}},
                "model: registers 3 cannot be split between the groups; expected an even number, such as 4",
            ),
            ({"model": {"hidden": 64}}, "model.kind: missing; expected one of pgm, mdlm, ar"),
            ({"cluster": {"workers": 0}}, "cluster.workers: 0: input should be greater than 0"),
            ({"cluster": {"workers": True}}, "cluster.workers: 'true': input should be a valid integer"),
            (
                {"cluster": {"hang_timeout_s": True}},
                "cluster.hang_timeout_s: 'true': input should be a valid",
            ),
            ({"cluster": {"hang_timeout_s": 1e300}}, "cluster.hang_timeout_s: 1e+300: input should be less"),
            ({"sampling": {"top_k": True}}, "sampling.top_k: 'true': input should be a valid integer"),
            ({"sampling": {"top_p": True}}, "sampling.top_p: 'true': input should be a valid number"),
            ({"evaluation": {"steps": [8, True]}}, "evaluation.steps.1: 'true': input should be a valid"),
            (
                {"evaluation": {"grid": {"guidnce": [1]}}},
                "evaluation.grid: 'guidnce' is not one of order, schedule",
            ),
            (
                {"sampling": {"length": 12}},
                "sampling.length: 12; expected null, since only rows with padding",
            ),
            (
                {"sampling": {"length": 2000}, "data": {"wrap": "sentence"}},
                "sampling.length: 2000; expected at most data.length 1024",
            ),
            (
                {"data": {"wrap": "sentence", "end_of_text": False}},
                "data: end_of_text False with wrap 'sentence'",
            ),
            (
                {"evaluation": {"zero_shot": {"a": {"source": "b"}}, "tasks": ["boolq"]}},
                "evaluation.zero_shot: together with other evaluations",
            ),
            (
                {"evaluation": {"grid": {"guidnce": [1]}}},
                f"evaluation.grid: 'guidnce' is not one of {', '.join(GRID_KEYS)}; did you mean 'guidance'?",
            ),
            (
                {"evaluation": {"grid": {"steps": [1]}}},
                f"evaluation.grid: 'steps' is not one of {', '.join(GRID_KEYS)}; expected evaluation.steps",
            ),
            (
                {"evaluation": {"grid": {"guidance": []}}},
                "evaluation.grid: guidance: []; expected at least one",
            ),
            (
                {"evaluation": {"grid": {"guidance": [1, -1]}}},
                "evaluation.grid: guidance: -1: input should be",
            ),
            (
                {"evaluation": {"grid": {"order": ["haltn"]}}},
                "evaluation.grid: order: 'haltn': input should be",
            ),
            (
                {"evaluation": {"grid": {"guidance": 1}}},
                "evaluation.grid.guidance: 1: input should be a valid",
            ),
            ({"evaluation": {"grid": {"guidance": [1]}}}, "evaluation.grid: without evaluation.models"),
            (
                {"evaluation": {"reference": "a.npz"}},
                "evaluation.reference: 'a.npz' is one of images; expected",
            ),
            ({"sampling": {"labels": []}}, "sampling.labels: []; expected at least one class, or null"),
            ({"sampling": {"seed": -1}}, "sampling.seed: -1: input should be greater than or equal to 0"),
            ({"sampling": {"seed": 2**64}}, "sampling.seed: 18446744073709551616: input should be less than"),
            ({"seed": 2**64}, "seed: 18446744073709551616: input should be less than"),
            ({"train": {"steps": 2**63}}, "train.steps: 9223372036854775808; expected an integer below 2^63"),
            ({"sampling": {"temperature": 1e-300}}, "sampling.temperature: 1e-300: input should be greater"),
            ({"sampling": {"temperature": 1e300}}, "sampling.temperature: 1e+300: input should be less"),
            ({"sampling": {"gumbel": 1e300}}, "sampling.gumbel: 1e+300: input should be less"),
            ({"sampling": {"gamma": 1e300}}, "sampling.gamma: 1e+300: input should be less"),
            ({"tracking": {"register_as": "a/b"}}, "tracking.register_as: 'a/b': string should match"),
            ({"tracking": {"register_as": "a@b"}}, "tracking.register_as: 'a@b': string should match"),
            ({"tracking": {"experiment": ""}}, "tracking.experiment: '': string should have at least 1"),
            ({"train": {"init_from": ""}}, "train.init_from: '': string should have at least 1 character"),
            ({"data": {"source": "a\0b"}}, "data.source: 'a\\x00b'; expected text without NUL characters"),
            ({"data": {"source": "a\ud800"}}, "data.source: 'a\\ud800': input should be a valid string"),
            ({"name": "a" * 200}, f"name: '{'a' * 200}': string should have at most 128 characters"),
            (
                {"model": {"kind": "pgm", "hidden": 10**9 + 7}},
                "model.hidden: 1000000007: input should be less",
            ),
            (
                {"cluster": {"workers": {"min": 3, "max": 2}}},
                "cluster.workers: min 3 is above max 2; expected at most 2",
            ),
            ({"cluster": {"workers": {"min": 2}}}, "cluster.workers.max: missing"),
            (
                {"cluster": {"workers": {"max": 2, "mni": 1}}},
                "cluster.workers.mni: no such key in cluster.workers; did you mean 'min'?",
            ),
            ({"cluster": {"hang_timeout_s": 0}}, "cluster.hang_timeout_s: 0: input should be greater than 0"),
            (
                {"model": {"kind": "mdlm", "hidden": 64, "heads": 5}},
                "model: heads 5 does not split hidden 64",
            ),
            ({"model": 3}, "model: 3: input should be"),
            ({"train": [1]}, "train: [1]: input should be"),
            ({"optim": {"betas": [0.9]}}, "optim.betas.1: missing"),
            ({"optim": {"lr": float("nan")}}, "optim.lr: nan: input should be"),
            ({"name": "../up"}, "name: '../up': string should match"),
            (
                {"cluster": {"storage": "s3://"}},
                "cluster.storage: 's3://' names no bucket; expected s3://BUCKET/FOLDER",
            ),
            (
                {"data": {"source": "gs:///corpus"}},
                "data.source: 'gs:///corpus' names no bucket; expected gs://",
            ),
            (
                {"data": {"path": "s3:///x"}},
                "data.path: 's3:///x' names no bucket; expected s3://BUCKET/FOLDER",
            ),
            (
                {"data": {"source": "\udcff"}},
                "data.source: '\\udcff': input should be a valid string",
            ),
            (
                {"data": {"wrap": "bos_eos", "length": 2}},
                "data: length 2 leaves no token between BOS and EOS",
            ),
        ],
    )
    def test_is_named(self, tree: dict[str, object], says: str) -> None:
        found = problems(tree)
        assert found.startswith("test: 1 problem\n  ")
        assert f"  {says}" in found

    @pytest.mark.parametrize(
        ("tree", "says"),
        [
            (
                {"train": {"batch": 12}, "data": {"streams": 8}},
                "data.streams: 8 does not divide train.batch 12; nearest that does: 6",
            ),
            ({"cluster": {"workers": 9}}, "cluster.workers: 9 workers for data.streams 8; expected at most"),
            ({"train": {"compile": True, "zero_stage": 3}}, "train.compile: true at stage 3, which gathers"),
            (
                {"train": {"steps": 12, "profile_steps": 3}, "optim": {"warmup_steps": 1}},
                "train.profile_steps: 3; expected at most 2 behind the first ten of 12 steps",
            ),
            (
                {"train": {"micro_tokens": 2048}, "data": {"wrap": "sentence"}},
                "train.micro_batch: 32 beside train.micro_tokens 2048; expected a number for one of them",
            ),
            (
                {"train": {"micro_batch": None}},
                "train.micro_batch: null beside train.micro_tokens null; expected a number for one of them",
            ),
            (
                {"train": {"micro_batch": None, "micro_tokens": 4096}},
                "train.micro_tokens: 4096 for rows without padding, which are equally long; expected null, and "
                "train.micro_batch 4",
            ),
            (
                {"train": {"micro_batch": None, "micro_tokens": 1000}, "data": {"wrap": "sentence"}},
                "train.micro_tokens: 1000; expected at least data.length 1024",
            ),
            (
                {"train": {"compile": True}, "data": {"wrap": "sentence"}},
                "train.compile: true for rows with padding",
            ),
            (
                {"cluster": {"workers": {"min": 1, "max": 9}}},
                "cluster.workers: 9 workers for data.streams 8; expected at most one worker a stream",
            ),
            (
                {"model": {"kind": "ar"}, "sampling": {"steps": 1024}},
                "sampling.order: 'uniform' for model.kind ar; expected left_to_right",
            ),
            (
                {"model": {"kind": "ar"}, "sampling": {"order": "left_to_right"}},
                "sampling.steps: 128 steps for model.kind ar, which draws one token a step; expected 1024",
            ),
            ({"train": {"steps": 100}}, "optim.warmup_steps: 2500 is not below train.steps 100"),
            (
                {"data": {"length": 64}},
                "sampling.steps: 128 steps for 64 predicted tokens a row; expected at most 64",
            ),
            (
                {"data": {"length": 128, "wrap": "bos_eos"}},
                "sampling.steps: 128 steps for 127 predicted tokens",
            ),
        ],
    )
    def test_conflict_between_sections(self, tree: dict[str, object], says: str) -> None:
        assert f"  {says}" in problems(tree)

    def test_all_at_once(self) -> None:
        found = problems({"train": {"stpes": 5, "precision": "fp8"}, "modle": {}, "optim": {"lr": -1}})
        assert found.startswith("test: 4 problems\n")
        for key in ("train.stpes", "train.precision", "modle", "optim.lr"):
            assert f"\n  {key}: " in found

    def test_all_conflicts_at_once(self) -> None:
        found = problems({"train": {"batch": 12, "steps": 100}, "cluster": {"workers": 9}})
        assert found.startswith("test: 3 problems\n")

    def test_name_is_required(self) -> None:
        with pytest.raises(ConfigError, match="name: missing"):
            parse({}, origin="test")

    def test_nothing_changes_after_loading(self) -> None:
        config = parse({"name": "a"}, origin="test")
        with pytest.raises(ValueError, match="frozen"):
            config.train.steps = 5


class TestFile:
    def test_missing_file_names_the_nearest(self, tmp_path: Path) -> None:
        write(tmp_path, "name: a")
        with pytest.raises(ConfigError, match=r"rnu\.yaml' does not exist; did you mean 'run\.yaml'"):
            load(tmp_path / "rnu.yaml")
        with pytest.raises(ConfigError, match="does not exist"):
            load(tmp_path / "nowhere" / "run.yaml")

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("name: [", "is not YAML"),
            ("- a\n- b", "holds a list; expected sections"),
            ("", "name: missing"),
            ("name: " + "1" * 5000, "is not YAML"),
            ("base: ~nosuchuser/run.yaml\nname: a", "config file .*~nosuchuser/run.yaml' does not exist"),
            ("base: " + "a" * 300 + "\nname: a", "cannot be read: File name too long"),
        ],
    )
    def test_what_is_no_config(self, tmp_path: Path, text: str, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            load(write(tmp_path, text))

    def test_a_key_written_twice(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"key 'train' is written twice(.|\n)*line 1"):
            load(write(tmp_path, "name: a\ntrain: {steps: 5}\ntrain: {batch: 8}"))

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_bytes(b"name: \xff\xfe\x00")
        with pytest.raises(ConfigError, match="is not YAML"):
            load(file)


class TestOverrides:
    def test_values_are_yaml(self, tmp_path: Path) -> None:
        words = ["train.steps=3000", "optim.betas=[0.8, 0.9]", "data.path=null", "tracking.system_metrics=no"]
        config = load(write(tmp_path, "name: a\ntrain: {steps: 5000}"), [*words, "model.kind=mdlm", "name=b"])
        assert config.train.steps == 3000
        assert config.optim.betas == (0.8, 0.9)
        assert config.data.path is None
        assert config.tracking.system_metrics is False
        assert isinstance(config.model, MDLMConfig)
        assert config.name == "b"

    @pytest.mark.parametrize(
        ("word", "says"),
        [
            ("train.steps=1:30", "train.steps: '1:30': input should be a valid integer"),  # YAML 1.1: 90
            ("optim.lr=1:30.5", "optim.lr: '1:30.5': input should be a valid number"),
            ("train={steps: 5, steps: 6}", "is not a YAML value: key 'steps' is written twice"),
            ("train.steps=" + "1" * 5000, "is not a YAML value"),
            ("data.revision=[" * 2000, "is not a YAML value"),
        ],
    )
    def test_surprises_of_yaml_are_refused(self, tmp_path: Path, word: str, says: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(says)):
            load(write(tmp_path, "name: a"), [word])

    def test_dates_and_leading_zeros_are_what_is_written(self, tmp_path: Path) -> None:
        words = ["data.revision=2024-13-45", "name=2024-01-01", "train.steps=0010000", "train.batch=0x200"]
        config = load(write(tmp_path, "name: a"), words)
        assert (config.data.revision, config.name) == ("2024-13-45", "2024-01-01")
        assert (config.train.steps, config.train.batch) == (10000, 512)
        assert parse(yaml.safe_load(dump(config)), origin="test") == config

    @pytest.mark.parametrize(
        "source",
        [
            *("my data #1", "#1", "*.jsonl", "&a", "a: b", "a:", "- x", "? x", "!x", "%20", "@x", "`x`", "|"),
            *(">", "{a}/b", "[ab]*.jsonl", "a::b", "what?", "C:\\data", "ü ☃ 😀", "it's", 'a"b', "~/data"),
            *("a  b", "a\tb"),
        ],
    )
    def test_text_that_yaml_would_read_as_something_else(self, source: str, tmp_path: Path) -> None:
        config = load(write(tmp_path, "name: a"), [f"data.source={source}", f"data.path= {source} "])
        assert (config.data.source, config.data.path) == (source, source)

    @pytest.mark.parametrize(
        ("text", "value"), [("'a #1'", "a #1"), ('"a: b"', "a: b"), ("null", None), ("", None)]
    )
    def test_quoted_text_and_null(self, text: str, value: str | None, tmp_path: Path) -> None:
        assert load(write(tmp_path, "name: a"), [f"data.path={text}"]).data.path == value

    def test_a_comment_is_no_part_of_a_number(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"train.steps: '5 #x': input should be a valid integer"):
            load(write(tmp_path, "name: a"), ["train.steps=5 #x"])

    def test_floats_as_people_write_them(self, tmp_path: Path) -> None:
        """YAML 1.1 reads `3e-4` as a word; the field's type says that it is a number."""
        config = load(write(tmp_path, "name: a\noptim: {lr: 3e-4}"), ["diffusion.eps=1e-4"])
        assert config.optim.lr == 3e-4
        assert config.diffusion.eps == 1e-4

    def test_bad_words_are_reported_with_the_rest(self, tmp_path: Path) -> None:
        words = ["train.steps", "=5", "optim.lr=[", "name.first=b", "train.btach=8"]
        with pytest.raises(ConfigError) as error:
            load(write(tmp_path, "name: a\ntrain: {precision: fp8}"), words)
        lines = str(error.value).splitlines()
        assert lines[0].endswith("run.yaml: 6 problems")
        for says in (
            "override 'train.steps': expected section.key=value",
            "override '=5': expected section.key=value",
            "override 'optim.lr=[': '[' is not a YAML value",
            "override 'name.first=b': 'name' is a value, not a section",
            "train.btach: no such key in train; did you mean 'batch'?",
            "train.precision: 'fp8' is not one of fp32, bf16",
        ):
            assert f"  {says}" in "\n".join(lines)

    def test_section_written_without_keys(self, tmp_path: Path) -> None:
        """`train:` with every key commented out is an empty section, for the file and for overrides."""
        assert load(write(tmp_path, "name: a\ntrain:\n")).train == RunConfig(name="a").train
        assert load(write(tmp_path, "name: a\ntrain:\n"), ["train.steps=7000"]).train.steps == 7000

    @pytest.mark.parametrize("word", ["train..steps=5", "train.=5", ".steps=5"])
    def test_empty_parts(self, tmp_path: Path, word: str) -> None:
        with pytest.raises(ConfigError, match=r"1 problem\n.*expected section\.key=value"):
            load(write(tmp_path, "name: a"), [word])


class TestRoundTrip:
    @pytest.mark.parametrize(
        "tree",
        [
            {},
            {"model": {"kind": "mdlm", "blocks": 3}, "optim": {"betas": [0.8, 0.95]}, "data": {"path": "x"}},
            {"tracking": {"uri": "http://server"}, "cluster": {"max_failures": -1}, "seed": 7},
            {"cluster": {"workers": {"min": 2, "max": 3}}},
        ],
    )
    def test_dump_then_parse(self, tree: dict[str, object]) -> None:
        config = parse({"name": "a", **tree}, origin="test")
        assert parse(yaml.safe_load(dump(config)), origin="dump") == config

    def test_workers_in_both_forms(self, tmp_path: Path) -> None:
        file = write(tmp_path, "name: a\ncluster: {workers: 3}")
        assert (load(file).cluster.least, load(file).cluster.most) == (3, 3)
        elastic = load(file, ["cluster.workers={max: 4}"]).cluster
        assert (elastic.least, elastic.most) == (1, 4)

    def test_flatten(self) -> None:
        flat = flatten(parse({"name": "a"}, origin="test").model_dump())
        assert flat["name"] == "a"
        assert flat["model.swap.positional"] is True
        assert flat["optim.betas"] == (0.9, 0.999)
        assert not any(isinstance(value, dict) for value in flat.values())

    def test_defaults_are_the_8_8_recipe(self) -> None:
        model = parse({"name": "a"}, origin="test").model
        assert isinstance(model, PGMConfig)
        assert (model.encoder_blocks, model.decoder_blocks, model.hidden, model.heads) == (8, 8, 768, 12)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(CONFIGS).as_posix())
def test_every_config_loads(file: Path) -> None:
    config = load(file)
    assert isinstance(config, RunConfig)
    assert file.read_text().startswith("#"), "a header says command, hardware, hours and expected figure"
    if config.cluster.accelerator == "gpu":
        assert config.train.precision == config.sampling.precision == "bf16"


def test_the_configs_are_there() -> None:
    """Else the test above would pass by having nothing to load."""
    names = {file.relative_to(CONFIGS).as_posix() for file in FILES}
    assert {f"text/{name}.yaml" for name in ("quickstart", "mdlm_quickstart", "quickstart_long")} <= names
    assert {f"text/{name}.yaml" for name in ("pgm_8_8", "pgm_6_6_dim1024", "mdlm")} <= names
    assert {f"text/{name}.yaml" for name in ("ar", "ar_quickstart")} <= names
    assert {f"text/complementary_mdlm{size}.yaml" for size in ("", "_quickstart")} <= names
    assert {f"distill/{name}.yaml" for name in ("quickstart", "pgm_8_8", "pgm_6_6_dim1024", "mdlm")} <= names


def test_configs_differ_in_name() -> None:
    """Runs of two recipes must not share a folder."""
    names = [load(file).name for file in FILES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["quickstart", "pgm_8_8", "pgm_6_6_dim1024", "mdlm"])
def test_students_read_the_data_of_their_teachers(name: str) -> None:
    """Under the name that the teacher's config registers."""
    student, teacher = load(CONFIGS / f"distill/{name}.yaml"), load(CONFIGS / f"text/{name}.yaml")
    streams = min(teacher.data.streams, student.train.batch)
    assert student.data == teacher.data.model_copy(update={"streams": streams})
    assert student.distill is not None
    assert student.distill.teacher == f"models:/{teacher.name}@teacher"
