"""What cannot be distilled is refused by one clear error before any worker starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config.load import load, parse
from pipeline.config.model import ARConfig, MDLMConfig, ModelConfig, PGMConfig
from pipeline.config.schema import DistillConfig, RunConfig
from pipeline.data.tokenizers import BPETokenizer, load_tokenizer
from pipeline.errors import CapabilityError, CheckpointError, ConfigError, DataError, PipelineError
from pipeline.models import build, model_folder
from pipeline.run import Run
from pipeline.training import distillation, launch
from tests.support.small_models import shake
from tests.support.tiny_runs import tiny

SIZE = {"hidden": 16, "heads": 2, "dropout": 0.0}
PGM = PGMConfig(encoder_blocks=1, decoder_blocks=1, **SIZE)
Distil = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(launch, "run_group", start)


def save(into: Path, model: ModelConfig, vocab_size: int = 257, length: int = 16) -> str:
    """A model folder with random weights."""
    torch.manual_seed(0)
    weights = shake(build(model, vocab_size, length)).state_dict()
    facts = model_folder.DataFacts(vocab_size, length, None, vocab_size - 1)
    model_folder.write(into, model, facts, weights, model_folder.Background())
    return str(into)


@pytest.fixture
def distil(run_storage: Path, tmp_path: Path) -> Distil:
    """`distil(teacher, section={...}, model section given)` -> config of a run in a folder of its own."""

    def make(teacher: str, model: ModelConfig | None = None, **section: object) -> RunConfig:
        config = tiny(run_storage, "student", cluster={"storage": str(tmp_path / "runs")})
        settings = DistillConfig.model_validate(
            {"teacher": teacher, "rounds": 2, "teacher_steps": 16, **section}
        )
        given = {name: getattr(config, name) for name in config.model_fields_set - {"model"}}
        given |= {"distill": settings} | ({} if model is None else {"model": model})
        return RunConfig(**given)

    return make


def refusal(kind: type[PipelineError], config: RunConfig) -> str:
    with pytest.raises(kind) as caught:
        launch.distill(config)
    return str(caught.value)


def test_what_fits_reaches_the_workers(distil: Distil, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="workers were started"):
        launch.distill(distil(save(tmp_path / "teacher", PGM), PGM))


@pytest.mark.parametrize(
    ("vocab_size", "length", "says"),
    [
        (300, 16, "vocabulary 300, the data's is 257"),
        (257, 32, "length 32, the data's is 16"),
        (300, 32, "vocabulary 300, the data's is 257; length 32, the data's is 16"),
    ],
)
def test_a_teacher_of_other_data(
    distil: Distil, tmp_path: Path, vocab_size: int, length: int, says: str
) -> None:
    teacher = save(tmp_path / "teacher", PGM, vocab_size, length)
    assert (
        refusal(DataError, distil(teacher)) == f"distill.teacher: {teacher!r} does not fit the data: {says}"
    )


def test_a_teacher_of_another_tokenizer(distil: Distil, tmp_path: Path) -> None:
    """The same number of ids, with other meanings."""
    teacher = save(tmp_path / "teacher", PGM)
    other = BPETokenizer("other", {bytes([byte]): 255 - byte for byte in range(256)})
    other.save(tmp_path / "teacher")
    own = load_tokenizer("bytes")
    assert other.vocab_size == own.vocab_size
    assert refusal(DataError, distil(teacher)) == (
        f"distill.teacher: {teacher!r} does not fit the data: "
        f"tokenizer (hash) {other.hash}, the data's is {own.hash}"
    )


def test_a_corrected_teacher_replaces_the_one_that_was_refused(distil: Distil, tmp_path: Path) -> None:
    refusal(DataError, distil(save(tmp_path / "wrong", PGM, 300)))
    other = PGM.model_copy(update={"hidden": 32})
    right = save(tmp_path / "right", other)
    config = distillation.with_teacher(Run(distil(right))).config
    assert config.model == other
    run = Run(config).folder
    assert distillation.read_origin(run)["teacher"] == right
    assert config.train.init_from == distillation.teacher_folder(run, 0)
    assert model_folder.read_config(Path(config.train.init_from))[0] == other


def test_an_autoregressive_teacher(distil: Distil, tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", ARConfig(kind="ar", blocks=1, **SIZE))
    said = refusal(CapabilityError, distil(teacher))
    assert said.startswith(f"distill.teacher: {teacher!r} is autoregressive: it draws one token per step")
    assert said.endswith("expected a pgm or mdlm teacher")


def test_the_complementary_form_of_a_masked_model(distil: Distil, tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", MDLMConfig(kind="mdlm", blocks=1, **SIZE))
    said = refusal(CapabilityError, distil(teacher, form="complementary"))
    assert said == (
        f"distill.form: complementary, but distill.teacher: {teacher!r} is of kind mdlm; "
        "expected pgm, or compatible"
    )


def test_a_model_section_that_is_not_the_teachers(distil: Distil, tmp_path: Path) -> None:
    teacher = save(tmp_path / "teacher", PGM)
    other = PGM.model_copy(update={"hidden": 32, "encoder_blocks": 2})
    assert refusal(ConfigError, distil(teacher, other)) == (
        f"the model section is not that of distill.teacher: {teacher!r}; leave it out, then the teacher's is used:\n"
        "  model.encoder_blocks: 2, the teacher's is 1\n"
        "  model.hidden: 32, the teacher's is 16"
    )


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (
            "/nowhere/model",
            "distill.teacher: '/nowhere/model': no such folder or file; expected a model folder",
        ),
        ("models:/nobody@teacher", "has no versions of a model 'nobody'"),
        ("models:/nobody", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_a_teacher_that_is_not_there(distil: Distil, teacher: str, says: str) -> None:
    assert says in refusal(CheckpointError, distil(teacher))


def test_a_folder_that_is_no_model(distil: Distil, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no model.safetensors; expected a consolidated model folder" in refusal(
        CheckpointError, distil(str(tmp_path / "empty"))
    )


def test_another_start_than_the_teacher(distil: Distil, tmp_path: Path) -> None:
    config = distil(save(tmp_path / "teacher", PGM))
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"init_from": "models:/other@teacher"})}
    )
    assert refusal(ConfigError, config) == (
        "train.init_from: 'models:/other@teacher'; expected null, a student starts as its teacher"
    )


def test_jobs_and_sections_belong_together(distil: Distil, tmp_path: Path) -> None:
    config = distil(save(tmp_path / "teacher", PGM))
    with pytest.raises(
        ConfigError, match=r"distill: a section for jobs\.distill; jobs\.pretrain takes configs"
    ):
        launch.pretrain(config)
    said = refusal(ConfigError, config.model_copy(update={"distill": None}))
    assert said == "distill: missing; expected a section with the teacher"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (
            {"divergence": "revers_kl"},
            "distill.divergence: 'revers_kl' is not one of reverse_kl, forward_kl, total_variation, mse; "
            "did you mean 'reverse_kl'?",
        ),
        (
            {"rounds": 7, "teacher_steps": 64},
            "distill.rounds: 7 rounds from 64 teacher steps end below one step; expected at most 6",
        ),
        ({"teacher_steps": 1}, "distill.teacher_steps: 1: input should be greater than or equal to 2"),
        ({"rounds": 6}, "distill.rounds: 6 do not divide train.steps 70000; nearest steps: 70002"),
        ({"form": "both"}, "distill.form: 'both' is not one of compatible, complementary"),
        ({"techer": "x"}, "distill.techer: no such key in distill; did you mean 'teacher'?"),
    ],
)
def test_a_wrong_section(section: dict[str, object], says: str) -> None:
    tree = {"name": "a", "train": {"steps": 70000}, "distill": {"teacher": "x", "rounds": 7, **section}}
    with pytest.raises(ConfigError) as caught:
        parse(tree, origin="test")
    assert f"  {says}" in str(caught.value)


def test_a_teacher_is_required(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\ndistill: {rounds: 2}")
    with pytest.raises(ConfigError, match=r"distill\.teacher: missing"):
        load(tmp_path / "a.yaml")


def test_guidance_without_a_model_section_waits_for_the_teachers(tmp_path: Path) -> None:
    """An unread teacher may have classes; of one without, the same is refused once it is read."""
    tree = {
        "name": "a",
        "data": {"kind": "image"},
        "train": {"steps": 6000},
        "optim": {"warmup_steps": 100},
        "sampling": {"guidance": 2.0, "steps": 4},
    }
    with pytest.raises(ConfigError, match=r"sampling\.guidance: needs a model with classes"):
        parse(tree, origin="test")
    teacher = save(tmp_path / "teacher", PGM, 128, 17)
    distill = {"distill": {"teacher": teacher}, "cluster": {"storage": str(tmp_path / "runs")}}
    config = parse({**tree, **distill}, origin="test")
    assert "with the teacher's model:\n  sampling.guidance: needs a model with classes" in refusal(
        ConfigError, config
    )


def test_rounds_keep_their_length(distil: Distil, tmp_path: Path) -> None:
    """Other steps would move the boundaries of rounds that are over."""
    from pipeline.training import resume

    config = distillation.with_teacher(Run(distil(save(tmp_path / "teacher", PGM)))).config
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 16})})
    with pytest.raises(CheckpointError, match=r"train\.steps: 8 -> 16"):
        resume.check_same(config.model_dump(mode="json"), more, "here")
    free = {"distill": None}
    resume.check_same(
        config.model_copy(update=free).model_dump(mode="json"), more.model_copy(update=free), "x"
    )
