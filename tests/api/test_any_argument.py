"""Any argument of any method: an answer that agrees with a plain formula, or an error that names the argument."""

import copy
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from pipeline import load_model
from pipeline.api import Model
from pipeline.config.model import ARConfig
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.errors import PipelineError
from pipeline.models.vq import PatchVQ
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from tests.api.test_model import written
from tests.support import dense
from tests.support.small_models import CAUSAL, MDLM, PGM, randomised

pytestmark = pytest.mark.usefixtures("unchecked")

V, L, BOS = 257, 12, 256
SMALL = {"hidden": 16, "heads": 2}
AR = ARConfig(kind="ar", blocks=1, dropout=0, **SMALL)
CODES = PatchVQ(np.random.default_rng(0).integers(256, size=(8, 2, 2, 3), dtype=np.uint8))


def text_model(config: Any, **changes: Any) -> Model:
    return Model(randomised(config.model_copy(update=SMALL | changes), V, L), BOS, ByteTokenizer())


MODELS = {
    "pgm": text_model(PGM),
    "causal": text_model(CAUSAL),
    "mdlm": text_model(MDLM),
    "ar": text_model(AR),
    "images": Model(
        randomised(PGM.model_copy(update=SMALL | {"classes": 3}), 8, 9), None, CODES, ["a", "b", "c"]
    ),
}
TOKENS = [[BOS, 72, 105, 46, 5, 6, 7, 8, 9, 10, 11, 12], [BOS, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 256]]
GROUPS = [[0, 1] * 6, [0, 0, 1] * 4]
CODE_ROWS = [[*range(8), 0], [7] * 9]
PIXELS = (np.arange(6 * 6 * 3).reshape(6, 6, 3) * 2).astype(np.uint8)
# A call of every method that works: the arguments that a case replaces, one or two at a time.
CALLS: dict[str, dict[str, Any]] = {
    "logits": {"tokens": TOKENS, "groups": GROUPS, "condition": None, "order": None},
    "predict": {
        "known": [[BOS, 72, 105], [BOS, 0, 0]],
        "positions": [[0, 3, 7], [0, 0, 0]],
        "lengths": [3, 1],
        "queries": [[1, 2], [11, 0]],
        "query_lengths": [2, 1],
        "condition": None,
    },
    "sample": {
        "num_samples": 2,
        "steps": 3,
        "order": None,
        "seed": 1,
        "condition": None,
        "progress": False,
        "known": {3: 7},
        "length": None,
        "filters": Filters(),
        "refresh_every": 1,
        "guidance": 0.0,
        "compile": False,
    },
    "sample_text": {"num_samples": 2, "steps": 3},
    "write": {
        "prompt": "ab",
        "num_samples": 1,
        "length": 16,
        "stride": 4,
        "steps": 2,
        "seed": 1,
        "order": None,
        "progress": None,
        "filters": Filters(top_k=4),
    },
    "infill": {"template": "ab[[3]]c", "num_samples": 1, "steps": 2},
    "score": {"pairs": [("ab", "cd"), ("", "e")], "draws": 2, "seed": 1, "progress": False},
    "decode": {"tokens": TOKENS},
    "images": {"tokens": CODE_ROWS},
    "sample_images": {"labels": [0, "b"], "num_samples": None, "steps": 2, "guidance": 1.0},
    "inpaint": {"image": PIXELS, "mask": PIXELS[..., 0] > 99, "num_samples": 2, "steps": 2},
}
# What differs for AR: it reads a beginning, and draws one token at a step.
CALLS_OF_AR: dict[str, dict[str, Any]] = {
    "predict": {
        "known": [[BOS, 5], [BOS, 0]],
        "positions": [[0, 1], [0, 0]],
        "lengths": [2, 1],
        "queries": [[2], [1]],
        "query_lengths": [1, 1],
    },
    "sample": {"known": {1: 7}, "steps": None},
    "sample_text": {"steps": L - 1},
    "write": {"steps": None},
    "infill": {"template": "ab[[3]]", "steps": None},
}
OF_IMAGES = {"images", "sample_images", "inpaint"}
# Words of messages that stand for an argument: what it is made of, or what the model lacks for it.
ALSO = {"score": ["pair"], "sample_images": ["condition"]}

# fmt: off
SCALARS = [
    None, True, False, -1, 0, 1, 2, 3, 13, 10**12, 10**30, -(10**30), 1.0, 1.5, -0.5, math.nan, math.inf, 1j,
    "", "a", "uniform", "entropy", "left_to_right", "haltn", "\ud800", "[[2]]", b"x", (), [], [[]], {}, (1, 2),
    {0: 1}, {3: 7, 5: 8}, {99: 1}, {1: -1}, {1: 1.5}, [{}, {2: 3}], object(), range(2), Fraction(1, 2), max,
    np.int64(2), np.uint8(1), np.float32(2), np.array(["a", "b"]), np.array(2), np.zeros((2, 0)),
    torch.tensor(2), torch.tensor(1.5), torch.tensor([0, 1]), torch.tensor([0.5]), torch.zeros(2, L),
    torch.zeros(2, L, dtype=torch.int64), torch.empty(2, L, device="meta"), torch.empty((), device="meta"),
    torch.zeros(2, 2).to_sparse(), [0, 1], ["a", "b"], ["a", 9], [None, 0], [0, [1]], [("a", "b")], [("a", 3)],
    Filters(top_k=2), Order("binomial"), Order("confidence"), "no_file.png", ["ab", "cd"],
]
# fmt: on


def changed(value: Any, how: int, cell: int, bad: Any) -> Any:
    """Write an array in another form, or with one bad cell, another type or another shape."""
    array = np.array(value)
    if how in (0, 1):
        array = array.astype(object if isinstance(bad, str | float) or bad is None else np.int64)
        array.flat[cell % max(1, array.size)] = bad
        return array.tolist()
    forms: list[Callable[[], Any]] = [
        lambda: array,
        lambda: torch.tensor(array),
        lambda: torch.tensor(array).int(),
        lambda: torch.tensor(array).to(torch.uint8) if array.max() < 256 else torch.tensor(array).short(),
        lambda: torch.tensor(array).float(),
        lambda: torch.tensor(array).bool(),
        lambda: torch.tensor(array).to("meta"),
        lambda: torch.tensor(array).transpose(0, -1).contiguous().transpose(0, -1),
        lambda: torch.tensor(array).transpose(0, -1),
        lambda: array[:1],
        lambda: array[:, :-1] if array.ndim > 1 else array[:-1],
        lambda: array[None],
        lambda: array[0],
        lambda: array.astype(str).tolist(),
        lambda: np.concatenate([array, array]),
        lambda: np.concatenate([array, array], -1),
    ]
    return forms[cell % len(forms)]()


def canonical(values: Any) -> torch.Tensor:
    return torch.as_tensor(values).long()


def check_logits(model: Model, arguments: Mapping[str, Any], answer: torch.Tensor) -> None:
    tokens, groups = canonical(arguments["tokens"]), canonical(arguments["groups"]).bool()
    assert answer.shape == (*tokens.shape, V)
    if arguments["order"] is None and not model.denoiser.causal:
        formula = dense.mdlm_logits if model.config.kind == "mdlm" else dense.pgm_logits
        for row in range(len(tokens)):
            expected = formula(model.denoiser, tokens[row], groups[row])  # type: ignore[arg-type]
            assert (answer[row] - expected).abs().max() <= 2e-5 * expected.abs().max()


def check_predict(model: Model, arguments: Mapping[str, Any], answer: torch.Tensor) -> None:
    known, places, lengths, queries = (
        canonical(arguments[name]) for name in ("known", "positions", "lengths", "queries")
    )
    asked = arguments["query_lengths"]
    counts = canonical([queries.shape[1]] * len(queries) if asked is None else asked)
    assert answer.shape == (*queries.shape, V)
    denoiser = model.denoiser
    for row in range(len(queries)):
        assert answer[row, counts[row] :].eq(0).all()
        hidden = torch.ones(L, dtype=torch.bool)
        tokens = torch.zeros(L, dtype=torch.int64)
        places_known = places[row, : lengths[row]]
        hidden[places_known], tokens[places_known] = False, known[row, : lengths[row]]
        if denoiser.causal or not counts[row]:
            continue
        if model.config.kind == "ar":
            expected = dense.ar_logits(denoiser, tokens)  # type: ignore[arg-type]
        elif model.config.kind == "mdlm":
            expected = dense.mdlm_logits(denoiser, tokens, hidden)  # type: ignore[arg-type]
        else:
            expected = dense.pgm_logits(denoiser, tokens, hidden)  # type: ignore[arg-type]
        at = expected[queries[row, : counts[row]]]
        assert (answer[row, : counts[row]] - at).abs().max() <= 2e-5 * expected.abs().max()


def check_sample(model: Model, arguments: Mapping[str, Any], answer: torch.Tensor) -> None:
    rows = int(arguments["num_samples"])
    assert answer.shape == (rows, L)
    assert answer[:, 0].eq(BOS).all()
    assert ((answer >= 0) & (answer < V)).all()
    known = arguments["known"]
    if isinstance(known, dict):
        assert all(answer[:, place].eq(token).all() for place, token in known.items())


def check_texts(model: Model, arguments: Mapping[str, Any], answer: list[str]) -> None:
    assert len(answer) == int(arguments["num_samples"])
    beginning = arguments.get("prompt", arguments.get("template", "").split("[[")[0])
    assert all(text.startswith(beginning) for text in answer)


def check_score(model: Model, arguments: Mapping[str, Any], answer: list[Any]) -> None:
    for (prompt, continuation), scored in zip(arguments["pairs"], answer, strict=True):
        first, then = prompt.encode(), continuation.encode()
        assert scored.tokens == len(then)
        if model.config.kind == "ar":
            ids = torch.tensor([BOS, *first, *then, *[0] * (L - 1 - len(first) - len(then))])
            logits = dense.ar_logits(model.denoiser, ids).log_softmax(-1)  # type: ignore[arg-type]
            places = torch.arange(len(then)) + 1 + len(first)
            assert scored.nats == pytest.approx(-float(logits[places, ids[places]].sum()), rel=1e-4)
        else:
            assert scored.nats > 0


def check_decode(model: Model, arguments: Mapping[str, Any], answer: list[str]) -> None:
    rows = canonical(arguments["tokens"]).tolist()
    assert answer == [bytes(i for i in row if i < 256).decode("utf-8", "replace") for row in rows]


def check_images(model: Model, arguments: Mapping[str, Any], answer: np.ndarray) -> None:
    tokens = canonical(arguments["tokens"])
    assert np.array_equal(answer, CODES.decode(tokens.numpy()))


def check_drawn(model: Model, arguments: Mapping[str, Any], answer: np.ndarray) -> None:
    count = arguments["num_samples"]
    assert answer.dtype == np.uint8
    labels = arguments.get("labels")
    expected = (4 if labels is None else len(labels)) if count is None else int(count)
    assert answer.shape == (expected, 6, 6, 3)


CHECKS: dict[str, Callable[..., None]] = {
    "logits": check_logits,
    "predict": check_predict,
    "sample": check_sample,
    "sample_text": check_texts,
    "write": check_texts,
    "infill": check_texts,
    "score": check_score,
    "decode": check_decode,
    "images": check_images,
    "sample_images": check_drawn,
    "inpaint": check_drawn,
}


@torch.no_grad()
def check(kind: str, method: str, changes: Mapping[str, Any]) -> None:
    """Call a method with changed arguments: it answers rightly, or names one of them."""
    model = MODELS["images" if method in OF_IMAGES else kind]
    arguments = copy.deepcopy(CALLS[method]) | dict(changes)
    if kind == "ar":
        arguments |= CALLS_OF_AR.get(method, {}) | dict(changes)
    try:
        answer = getattr(model, method)(**arguments)
    except PipelineError as error:
        words = [*arguments, *ALSO.get(method, [])]
        message = str(error)
        assert re.search(rf"\b({'|'.join(map(re.escape, words))})\b", message.split(";")[0]), message
        if len(changes) == 1 and method not in ("predict", "logits"):
            (name,) = changes
            own = [
                name,
                *ALSO.get(method, []),
                *(["steps", "positions"] if name in ("known", "order") else []),
            ]
            assert re.search(rf"\b({'|'.join(own)})\b", message), (name, message)
        return
    CHECKS[method](model, arguments, answer)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    kind = draw(st.sampled_from([name for name in MODELS if name != "images"]))
    method = draw(st.sampled_from([*CALLS]))
    names = draw(st.lists(st.sampled_from([*CALLS[method]]), min_size=1, max_size=2, unique=True))
    changes = {}
    for name in names:
        value = CALLS[method][name]
        if isinstance(value, list | np.ndarray) and name not in ("pairs", "labels") and draw(st.booleans()):
            bad = draw(st.sampled_from([-1, 0, 1, L, V, 2**40, 1.5, math.nan, "a", None]))
            changes[name] = changed(value, draw(st.integers(0, 5)), draw(st.integers(0, 40)), bad)
        else:
            changes[name] = draw(st.sampled_from(SCALARS))
    return kind, method, changes


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cases())
@example(("mdlm", "sample", {"known": {3: V}}))  # the mask
@example(("pgm", "logits", {"tokens": [[1, V]], "groups": [[0, 1]]}))
@example(("pgm", "predict", {"known": [[1, V]], "positions": [[0, 3]], "lengths": [2]}))
@example(("pgm", "predict", {"queries": [[0, 3], [0, 0]]}))  # asked and known
@example(("pgm", "predict", {"positions": [[0, 3, 3], [0, 0, 0]]}))  # known twice
@example(("pgm", "sample", {"known": (torch.zeros(2, 5), torch.zeros(2, 5))}))
@example(("pgm", "sample", {"known": {0: 5}}))  # in BOS's place
@example(("pgm", "sample", {"steps": 1, "guidance": -1.0}))
@example(("pgm", "sample_images", {"steps": 1, "guidance": 2.0}))
@example(("pgm", "sample", {"refresh_every": 0}))
@example(("pgm", "sample", {"order": Order("confidence"), "num_samples": 0}))
@example(("pgm", "write", {"length": 0, "stride": 0}))
@example(("pgm", "write", {"steps": 0}))
@example(("ar", "score", {"draws": 0}))
@example(("mdlm", "decode", {"tokens": TOKENS[0]}))  # one row
@example(("pgm", "sample_images", {"labels": [0, 1], "num_samples": 3}))
def test_any_argument(case: tuple[str, str, dict[str, Any]]) -> None:
    check(*case)


ARGUMENTS = [(load_model, name) for name in ("path", "device", "overrides", "precision")]
ARGUMENTS += [(Filters, name) for name in ("temperature", "top_k", "top_p")]
ARGUMENTS += [(Order, name) for name in ("name", "schedule", "gumbel", "gamma")]
PATHS = [
    "",
    "s3://",
    "gs://",
    "models:/",
    "models:/a",
    "hf:",
    "hf:a",
    "\0",
    "a" * 5000,
    ".",
    "/",
    "~nobody/x",
]


@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=lambda value: getattr(value, "__name__", value))
def test_any_setting(function: Callable[..., Any], name: str, tmp_path: Path) -> None:
    written(tmp_path, PGM)
    for value in SCALARS + (PATHS if name == "path" else []):
        arguments = {"path": tmp_path, name: value} if function is load_model else {name: value}
        message = None
        try:
            function(**arguments)
        except PipelineError as error:
            message = str(error)
        word = {"name": "order", "path": "", "overrides": "override"}.get(name, name)
        assert message is None or word in message, (value, message)
