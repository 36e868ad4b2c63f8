"""The model object: a written folder comes back whole, shapes and dtypes, and what is refused."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipeline
from pipeline import storage
from pipeline.api import Model, load_model
from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.errors import CapabilityError, CheckpointError, ConfigError, DataError
from pipeline.models import model_folder
from pipeline.models.denoiser import Denoiser
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from tests.support.small_models import BOTH_KINDS, CAUSAL, random_rows, randomised

V, L = 257, 16
ROWS = torch.full((2, L), 3)


KINDS = pytest.mark.parametrize("config", BOTH_KINDS, ids=lambda config: config.kind)


def written(path: Path, config: PGMConfig | MDLMConfig | ARConfig, bos: int | None = 256) -> Denoiser:
    """Write a consolidated folder and return the model that is in it."""
    model = randomised(config, V, L)
    model_folder.write(
        path, config, model_folder.DataFacts(V, L, bos, 256), model.state_dict(), model_folder.Background()
    )
    ByteTokenizer().save(path)
    return model


@pytest.fixture(params=BOTH_KINDS, ids=lambda config: config.kind)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    written(tmp_path / "model", request.param)
    return load_model(tmp_path / "model")


def test_what_a_model_says_of_itself(model: Model) -> None:
    assert (model.length, model.vocab_size, model.config.hidden) == (L, V, 32)
    parameters = sum(value.numel() for value in model.denoiser.parameters())
    assert repr(model) == (
        f"Model({model.config.kind}, {parameters:,} parameters, L=16, V=257, tokenizer bytes, cpu, fp32)"
    )
    classes = PGMConfig(hidden=32, heads=4, encoder_blocks=1, decoder_blocks=1, classes=3)
    assert "V=7, 3 classes, no tokenizer, cpu, bf16)" in repr(Model(randomised(classes, 7, 9).bfloat16()))


@pytest.mark.parametrize("stop", [False, True])
def test_progress_is_told(stop: bool, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all windows together; a bar goes to standard error."""
    if stop:  # all rows end in the first window
        with torch.no_grad():
            model.denoiser.head.bias[256] = 100.0
    told: list[tuple[int, int]] = []
    model.write("ab", length=40, stride=5, steps=4, progress=lambda *at: told.append(at))
    totals = {total for _, total in told}
    assert len(totals) == 1
    done = [done for done, _ in told]
    assert done == ([1, 2, 3, 4, *totals] if stop else [*range(1, len(told) + 1)])
    assert done[-1] in totals
    model.sample(2, 3, progress=True)
    model.score([("a", "b")] * 3, progress=True)
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert "steps/s" in shown.err
    assert "pairs/s" in shown.err
    assert not shown.out


@KINDS
@pytest.mark.parametrize("as_string", [False, True])
def test_a_folder_comes_back_whole(
    config: PGMConfig | MDLMConfig, as_string: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = written(tmp_path / "run" / "model", config)
    monkeypatch.chdir(tmp_path)
    model = pipeline.load_model("run/model" if as_string else Path("run/model"))
    assert isinstance(model, pipeline.Model)
    assert not model.denoiser.training
    assert (model.bos, model.denoiser.vocab_size, model.denoiser.length) == (256, V, L)
    assert model.denoiser.state_dict().keys() == original.state_dict().keys()
    tokens, groups = random_rows(3, L, V)
    with torch.inference_mode():
        assert torch.equal(model.logits(tokens, groups), original.logits(tokens, groups))
    _, config_read, facts = model_folder.read(tmp_path / "run" / "model")
    assert config_read == config
    assert facts == model_folder.DataFacts(V, L, 256, 256)


@pytest.mark.parametrize(
    "config", [*BOTH_KINDS, ARConfig(kind="ar", hidden=32, heads=4, blocks=1)], ids=lambda c: c.kind
)
def test_a_model_of_padded_rows(config: PGMConfig | MDLMConfig | ARConfig, tmp_path: Path) -> None:
    """Lengths of training rows travel with the folder; texts end with their row."""
    lengths = (0,) * 6 + (3, 0, 1)  # three rows of 6 tokens, one of 8
    facts = model_folder.DataFacts(V, L, 256, 256, pad=256, row_lengths=lengths)
    weights = randomised(config, V, L).state_dict()
    model_folder.write(tmp_path / "model", config, facts, weights, model_folder.Background())
    ByteTokenizer().save(tmp_path / "model")
    model = load_model(tmp_path / "model")
    rows = model.sample(8, seed=1)
    assert model.write("abc", num_samples=2)[0].startswith("abc")
    if config.kind == "ar":
        with pytest.raises(CapabilityError, match="decides itself where a text ends"):
            model.sample(1, length=5)
        return
    assert {row.tolist().index(256, 1) + 1 for row in rows} <= {*range(2, 9)}
    assert (rows[:, 8:] == 256).all()
    five = model.sample(8, seed=1, length=5)
    assert (five[:, 4:] == 256).all()
    assert all(
        len(text.encode("utf-8", "replace")) <= 3 * 3 for text in model.decode(five)
    )  # U+FFFD has 3 bytes


def test_logits(model: Model) -> None:
    tokens, groups = random_rows(3, L, V)
    logits = model.logits(tokens, groups.long())
    assert logits.shape == (3, L, V)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.equal(logits, model.logits(tokens, groups))
    assert torch.equal(logits, model.logits(tokens.int(), groups.to(torch.uint8)))


def test_predict(model: Model) -> None:
    known, positions = torch.tensor([[256, 5], [256, 0]]), torch.tensor([[0, 3], [0, 0]])
    queries = torch.tensor([[1, 2, 4], [7, 0, 0]])
    logits = model.predict(known, positions, torch.tensor([2, 1]), queries, torch.tensor([3, 1]))
    assert logits.shape == (2, 3, V)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert logits[1, 1:].eq(0).all()
    assert logits[1, 0].ne(0).all()


def test_sample_and_decode(model: Model) -> None:
    rows = model.sample(num_samples=3, steps=4, order="uniform", seed=1)
    assert rows.shape == (3, L)
    assert rows[:, 0].eq(256).all()
    assert rows.min() >= 0
    assert rows.max() < V
    assert torch.equal(rows, model.sample(3, 4, seed=1))
    model.bos = None
    assert model.sample(5, steps=L).shape == (5, L)
    texts = model.decode(torch.tensor([[256, 72, 105, 256]]))
    assert texts == ["Hi"]


def test_default_arguments(model: Model) -> None:
    """64 steps, or as many as there are positions."""
    assert torch.equal(model.sample(), model.sample(num_samples=4, steps=15, order="uniform", seed=0))
    longer = Model(randomised(BOTH_KINDS[0], 7, 80))
    assert torch.equal(longer.sample(), longer.sample(num_samples=4, steps=64, order="uniform", seed=0))


@pytest.mark.parametrize(
    "config", [*BOTH_KINDS, ARConfig(kind="ar", hidden=32, heads=4, blocks=2, dropout=0)]
)
def test_bf16(config: PGMConfig | MDLMConfig | ARConfig, tmp_path: Path) -> None:
    """Weights and blocks in bfloat16, predictions near the exact ones, logits in float32."""
    written(tmp_path / "model", config)
    exact, model = (load_model(tmp_path / "model", precision=precision) for precision in ("fp32", "bf16"))
    assert {value.dtype for value in model.denoiser.parameters()} == {torch.bfloat16}
    known, queries = torch.tensor([[256, 5, 9], [256, 0, 0]]), torch.tensor([[3], [1]])
    there = known, torch.tensor([[0, 1, 2], [0, 0, 0]]), torch.tensor([3, 1]), queries
    logits = model.predict(*there)
    assert logits.dtype == torch.float32
    difference = (logits.softmax(-1) - exact.predict(*there).softmax(-1)).abs().sum(-1) / 2
    assert 0 < difference.max() < 0.05
    rows = model.sample(3, L - 1)
    assert torch.equal(rows, model.sample(3, L - 1))
    assert ((rows >= 0) & (rows < V)).all()
    if config.kind == "pgm":
        assert model.sample(3, 5, refresh_every=2).shape == (3, L)


def test_a_precision_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="precision: 'fp16' is not one of fp32, bf16; did you mean 'bf16'"):
        load_model("nowhere", precision="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [[[0, 0, 2]], [[-2, 0, 1]], [[1, 2, 3]]])
def test_an_order_ranks_every_position_once(order: list[list[int]]) -> None:
    model, tokens = Model(randomised(CAUSAL, 11, 3)), torch.tensor([[1, 2, 3]])
    with pytest.raises(ConfigError, match="order: expected the ranks 0 to 2 once in every row"):
        model.logits(tokens, torch.tensor([[0, 1, 0]]), order=torch.tensor(order))


def test_what_the_model_cannot_do_is_refused(model: Model) -> None:
    tokens, groups = random_rows(2, L, V)
    labels = torch.tensor([0, 1])
    with pytest.raises(CapabilityError, match=r"condition: .* without classes"):
        model.logits(tokens, groups, condition=labels)
    with pytest.raises(CapabilityError, match=r"condition: .* without classes"):
        model.predict(tokens, tokens * 0, torch.tensor([1, 1]), tokens[:, :1] * 0, condition=labels)
    with pytest.raises(CapabilityError, match=r"condition: .* without classes"):
        model.sample(2, 4, condition=labels)
    with pytest.raises(ConfigError, match="order: 'haltn'"):
        model.sample(2, 4, order="haltn")
    with pytest.raises(ConfigError, match="steps: 64 for 15 positions"):
        model.sample(steps=64)


@KINDS
def test_tensors_that_do_not_fit_are_all_named(config: PGMConfig | MDLMConfig, tmp_path: Path) -> None:
    written(tmp_path, config)
    tensors = load_file(tmp_path / model_folder.WEIGHTS)
    tensors["head.biass"] = tensors.pop("head.bias")
    tensors["embedding.weight"] = tensors["embedding.weight"][:-1].clone()
    save_file(tensors, tmp_path / model_folder.WEIGHTS)
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path)
    message = str(refused.value)
    assert str(tmp_path / model_folder.WEIGHTS) in message
    assert f"missing head.bias [{V}]" in message
    assert "extra head.biass; did you mean 'head.bias'?" in message
    rows = V + (config.kind == "mdlm")
    assert f"embedding.weight is [{rows - 1}, 32], expected [{rows}, 32]" in message
    assert message.count("\n") == 3, "one line for each problem"


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*no such folder or file"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"no model.safetensors.*found notes.txt"):
        load_model(tmp_path)
    written(tmp_path, BOTH_KINDS[0])
    (tmp_path / model_folder.CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"no config.yaml"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", [model_folder.WEIGHTS, model_folder.CONFIG])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    written(tmp_path, BOTH_KINDS[0])
    whole = (tmp_path / name).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\x00" * 64):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (model_folder.CONFIG, "data: null\nmodel: {kind: pgm}", "is damaged"),
        (model_folder.CONFIG, "data: [1]\nmodel: {kind: pgm}", "is damaged"),
        (
            model_folder.CONFIG,
            "data: {vocab_size: x, length: 16}\nmodel: {kind: pgm}",
            "data: vocab_size: 'x'",
        ),
        (model_folder.CONFIG, "data: {vocab_size: 257, length: null}\nmodel: {kind: pgm}", "length: missing"),
        (model_folder.CONFIG, "data: {vocab_size: 257, length: 16}\nrun: {name: a}", "is damaged"),
        ("tokenizer_info.json", "", "is damaged (JSONDecodeError"),
        ("tokenizer_info.json", "[]", "is damaged (TypeError"),
        ("tokenizer_info.json", "{}", "is damaged (KeyError: 'kind')"),
        (
            "tokenizer_info.json",
            '{"kind": "byte", "name": "bytes", "hash": ""}',
            "kind 'byte'; expected bytes or text8 or bpe or fast; did you mean 'bytes'?",
        ),
        ("tokenizer_info.json", '{"kind": "bytes", "name": "bytes", "hash": "5"}', "hash '5' is not that of"),
    ],
)
def test_damaged_contents_are_named(name: str, text: str, says: str, tmp_path: Path) -> None:
    written(tmp_path, BOTH_KINDS[0])
    (tmp_path / name).write_text(text)
    with pytest.raises((CheckpointError, DataError), match=f"{name}.*{re.escape(says)}"):
        load_model(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    written(tmp_path, BOTH_KINDS[0])
    tensors = load_file(tmp_path / model_folder.WEIGHTS)
    tensors["head.bias"][3] = torch.nan
    save_file(tensors, tmp_path / model_folder.WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors holds values that are not finite: head.bias"
    ):
        load_model(tmp_path)


def test_files_and_folders_follow_the_umask(tmp_path: Path) -> None:
    """Others can read a model on a shared folder if the umask lets them."""
    previous = os.umask(0o027)
    try:
        written(tmp_path / "model", BOTH_KINDS[0])
        with tempfile.TemporaryDirectory() as temporary:
            storage.publish_folder(temporary, str(tmp_path / "published"))
    finally:
        os.umask(previous)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert set(modes) == {"model.safetensors", "config.yaml", "config.json", "tokenizer_info.json"}
    assert set(modes.values()) == {0o640}
    assert (tmp_path / "published").stat().st_mode & 0o777 == 0o750


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    model = randomised(BOTH_KINDS[0], 7, L)
    facts = model_folder.DataFacts(7, L, None, None)
    model_folder.write(tmp_path, BOTH_KINDS[0], facts, model.state_dict(), model_folder.Background())
    loaded = load_model(tmp_path)
    assert loaded.tokenizer is None
    assert loaded.bos is None
    assert loaded.sample(2, 4).shape == (2, L)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("known", "positions", "lengths", "queries", "says"),
    [
        ([[1, 2]], [[0, L]], [2], [[1]], f"positions: {L}; expected 0 to {L - 1}"),
        ([[1, 2]], [[0, 2]], [2], [[-1]], "queries: -1; expected 0"),
        ([[1, 2]], [[0, 2]], [3], [[1]], "positions: lengths [3]; expected one of 0 to 2 for each of 1 rows"),
        ([[1, 2]], [[0, 2]], [1, 1], [[1]], "positions: lengths [1, 1]"),
        ([[1, 2]], [[0, 2]], [2], [[2]], "queries: position 2 of row 0 is known; expected unknown positions"),
        ([[1, 2]], [[3, 3]], [2], [[2]], "positions: position 3 of row 0 is known twice"),
        (
            [[1] * 20],
            [[*range(16), 1, 2, 3, 4]],
            [20],
            [[2]],
            "positions: position 1 of row 0 is known twice",
        ),
        ([[1, V]], [[0, 3]], [2], [[2]], f"known: {V}; expected 0 to {V - 1}"),
        ([[-2, 1]], [[0, 3]], [2], [[2]], f"known: -2; expected 0 to {V - 1}"),
        ([[1.5, 2]], [[0, 3]], [2], [[2]], "known: values of type float32; expected integers"),
        ([[1, 2]], [[0, 3, 4]], [2], [[2]], "positions: shape [1, 3]; expected [1, 2]"),
        ([[1, 2]], [[0, 3]], [2], [2], "queries: shape [1]; expected [B, Q]"),
        ([[1], [2]], [[0], [3]], [1, 1], [[2]], "known: shape [2, 1]; expected [1, K]"),
    ],
)
@pytest.mark.parametrize("convert", [torch.tensor, list])
def test_predictions_that_cannot_be_made_are_refused(
    known: list[list[float]],
    positions: list[list[int]],
    lengths: list[int],
    queries: Any,
    says: str,
    convert: Callable[..., Any],
) -> None:
    model = Model(randomised(BOTH_KINDS[0], V, L))
    with pytest.raises(ConfigError, match=re.escape(says)):
        model.predict(*map(convert, (known, positions, lengths, queries)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_samples": 0}, "num_samples: 0; expected an integer from 1 to 1000000"),
        (
            {"steps": 10**9, "order": "binomial"},
            "steps: 1000000000 for 15 positions to reveal; expected 1 to 1000000",
        ),
        ({"num_samples": True}, "num_samples: True; expected an integer from 1 to 1000000"),
        ({"steps": 0}, "steps: 0 for 15 positions to reveal; expected 1 to 15"),
        ({"steps": 4.0}, "steps: 4.0 for 15 positions to reveal; expected 1 to 15"),
        ({"seed": -1}, "seed: -1; expected an integer of at least 0"),
        ({"order": ""}, "order: '' is not one of uniform"),
        ({"order": 5}, "order: 5 is a int; expected str or Order"),
        ({"guidance": -1.0}, "guidance: -1.0; expected a number from 0 to 1e+06"),
        ({"guidance": float("nan")}, "guidance: nan; expected a number from 0 to 1e+06"),
        ({"refresh_every": 0}, "refresh_every: 0; expected an integer of at least 1"),
        ({"filters": 0.7}, "filters: 0.7 is a float; expected Filters"),
        ({"condition": "cat"}, "condition: no array"),
        ({"condition": [0.5, 1.0]}, "condition: values of type float32; expected integers"),
        ({"known": {V: 5}}, f"known: position: {V}; expected an integer from 0 to {L - 1}"),
        ({"known": {"3": 5}}, "known: position: '3'; expected an integer from 0"),
        ({"known": {3: "a"}}, "known: token at position 3: 'a'; expected an integer of at least 0"),
        ({"known": {3: V}}, f"known: token: {V}; expected 0 to {V - 1}"),  # the mask of a masked model
        ({"known": {0: 5}}, "known: token 5 at position 0; expected BOS, 256, or no token"),
        ({"known": [{}]}, "known: 1 prompts for 2 samples; expected one for each"),
        ({"known": 5}, "known: 5 is a int; expected dict or list"),
        ({"known": [[3], [4]]}, "known: [3] is a list; expected dict"),
        ({"known": (ROWS, ROWS, ROWS)}, "known: a tuple of 3; expected (tokens, mask)"),
        ({"known": (ROWS[:, :5], ROWS[:, :5])}, f"known: tokens: shape [2, 5]; expected [2, {L}]"),
        ({"known": (ROWS, ROWS)}, "known: mask: values of type int64; expected booleans, or 0 and 1"),
        ({"known": (ROWS.float(), ROWS.bool())}, "known: tokens: values of type float32; expected integers"),
    ],
)
def test_arguments_of_sample(options: dict[str, Any], says: str) -> None:
    model = Model(randomised(BOTH_KINDS[1], V, L), bos=256)
    with pytest.raises(ConfigError, match=re.escape(says)):
        model.sample(**{"num_samples": 2, "steps": 4, **options})


@pytest.mark.usefixtures("unchecked")
def test_known_tokens_in_any_form_are_kept() -> None:
    model = Model(randomised(BOTH_KINDS[0], V, L), bos=256)
    expected = model.sample(2, 4, known={0: 256, 3: 7})
    tokens, mask = torch.zeros(2, 2, L, dtype=torch.int32)
    tokens[:, 0], tokens[:, 3], mask[:, 0], mask[:, 3] = 256, 7, 1, 1
    for known in ([{3: 7}, {0: 256, 3: 7}], (tokens, mask), (tokens.numpy(), mask.bool().tolist())):
        assert torch.equal(model.sample(2, 4, known=known), expected)
    assert expected[:, 3].eq(7).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": 5}, "prompt: 5 is a int; expected str"),
        ({"prompt": "a\ud800"}, "prompt: '\\ud800' at index 1 is half of a surrogate pair"),
        ({"num_samples": 0}, "num_samples: 0; expected an integer from 1 to 1000000"),
        ({"length": 0}, "length: 0; expected an integer from 4 to 1000000000"),
        ({"length": 3}, "length: 3; expected an integer from 4 to 1000000000"),  # BOS, prompt and one token
        ({"stride": 0}, "stride: 0; expected an integer of at least 1"),
        ({"steps": 0}, "steps: 0; expected an integer of at least 1"),
        ({"steps": 2.5}, "steps: 2.5; expected an integer of at least 1"),
        ({"seed": -1}, "seed: -1; expected an integer of at least 0"),
        ({"order": ""}, "order: '' is not one of uniform"),
    ],
)
def test_arguments_of_write(options: dict[str, Any], says: str) -> None:
    model = Model(randomised(BOTH_KINDS[0], V, L), bos=256, tokenizer=ByteTokenizer())
    with pytest.raises(ConfigError, match=re.escape(says)):
        model.write(**{"prompt": "ab", **options})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("pairs", "options", "says"),
    [
        ([("a", "b")], {"draws": 0}, "draws: 0; expected an integer from 1 to"),
        ([("a", "b")], {"seed": -1}, "seed: -1; expected an integer of at least 0"),
        (["ab"], {}, "pairs: 'ab'; expected a prompt and a continuation"),
        ([("a",)], {}, "pairs: ('a',); expected a prompt and a continuation"),
        ([("a", 5)], {}, "pairs: 5 is a int; expected str"),
        ([("a", "\udc00")], {}, "pairs: '\\udc00' at index 0 is half of a surrogate pair"),
        ([("a", "")], {}, "pair 0: 1 + 0 tokens; expected a continuation of at least one token"),
    ],
)
def test_arguments_of_score(pairs: Any, options: dict[str, int], says: str) -> None:
    model = Model(randomised(BOTH_KINDS[0], V, L), tokenizer=ByteTokenizer())
    with pytest.raises(ConfigError, match=re.escape(says)):
        model.score(pairs, **options)


def test_rows_to_decode() -> None:
    model = Model(randomised(BOTH_KINDS[0], V, L), bos=300, tokenizer=ByteTokenizer())
    assert model.decode([[300, 72, 105, 256]]) == ["Hi"]
    for tokens, says in (
        ([72, 105], "tokens: shape [2]; expected [B, L]"),
        ([[72], [72, 105]], "tokens: no array"),
        ([[72.0]], "tokens: values of type float32; expected integers"),
        ([[257]], "tokens: 257; expected 0 to 256"),
        ([[-1]], "tokens: -1; expected 0 to 256"),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            model.decode(tokens)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("tokens", "groups", "says"),
    [
        ([[1] * (L + 1)], [[0] * (L + 1)], f"tokens: rows of {L + 1}; expected at most {L}"),
        ([[1, V]], [[0, 1]], f"tokens: {V}; expected 0 to {V - 1}"),
        ([[1, 2]], [[0, 2]], "groups: values of type int64; expected booleans, or 0 and 1"),
        ([[1, 2]], [[0, 1, 0]], "groups: shape [1, 3]; expected [1, 2]"),
        ([1, 2], [0, 1], "tokens: shape [2]; expected [B, L]"),
        ([[1.0, 2.0]], [[0, 1]], "tokens: values of type float32; expected integers"),
    ],
)
def test_arguments_of_logits(tokens: Any, groups: Any, says: str) -> None:
    model = Model(randomised(BOTH_KINDS[0], V, L))
    with pytest.raises(ConfigError, match=re.escape(says)):
        model.logits(tokens, groups)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0}, "temperature: 0; expected above 0; top_k=1 takes the likeliest token"),
        ({"temperature": 1e-300}, "temperature: 1e-300; expected a number from 1e-06 to 1e+06"),
        ({"temperature": float("inf")}, "temperature: inf; expected a number from 1e-06 to 1e+06"),
        ({"temperature": "hot"}, "temperature: 'hot'; expected a number"),
        ({"top_k": 2.5}, "top_k: 2.5; expected an integer of at least 1"),
        ({"top_k": 0}, "top_k: 0; expected an integer of at least 1"),
        ({"top_p": 0}, "top_p: 0; expected above 0 and at most 1, or None"),
        ({"top_p": 1.5}, "top_p: 1.5; expected a number from 0 to 1"),
    ],
)
def test_settings_of_filters(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        Filters(**options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "haltn"}, "order: 'haltn' is not one of uniform"),
        ({"schedule": "arcos"}, "schedule: 'arcos' is not one of linear, arccos; did you mean 'arccos'?"),
        ({"gumbel": -1.0}, "gumbel: -1.0; expected a number from 0 to 1e+06"),
        ({"gumbel": 1e300}, "gumbel: 1e+300; expected a number from 0 to 1e+06"),
        ({"gamma": float("nan")}, "gamma: nan; expected a number from 0 to 1e+06"),
    ],
)
def test_settings_of_orders(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        Order(**options)


def test_arguments_of_load_model(tmp_path: Path) -> None:
    written(tmp_path, BOTH_KINDS[0])
    with pytest.raises(CapabilityError, match="device: 'tpu9'"):
        load_model(tmp_path, device="tpu9")
    with pytest.raises(CapabilityError, match="device: 'meta' holds no values"):
        load_model(tmp_path, device="meta")
    with pytest.raises(ConfigError, match="overrides: 'length=5' is a str; expected list or tuple"):
        load_model(tmp_path, overrides="length=5")
    with pytest.raises(ConfigError, match="path: None is a NoneType; expected str or Path"):
        load_model(None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bos", [-1, V, "a"])
def test_a_bos_that_the_model_does_not_read(bos: Any) -> None:
    with pytest.raises(ConfigError, match=f"bos: {bos!r}; expected an integer from 0 to {V - 1}"):
        Model(randomised(BOTH_KINDS[0], V, L), bos=bos).sample(1, 1)
