"""On a fine grid most steps reveal something in few rows, and only those rows are computed."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig
from pipeline.models.batch import State
from pipeline.models.denoiser import Denoiser
from pipeline.sampling.sampler import SamplingRequest, sample
from tests.support.small_models import randomised

V, L = 11, 16
SIZES = {"hidden": 16, "heads": 2, "dropout": 0.0}
CONFIGS = [
    PGMConfig(encoder_blocks=1, decoder_blocks=1, **SIZES),
    PGMConfig(encoder_blocks=1, decoder_blocks=1, registers=4, classes=3, **SIZES),
    MDLMConfig(kind="mdlm", blocks=1, registers=1, classes=3, **SIZES),
]


@pytest.fixture(params=CONFIGS, ids=["pgm", "pgm with classes", "mdlm with classes"])
def model(request: pytest.FixtureRequest) -> Denoiser:
    return randomised(request.param, V, L).double()


def labels(model: Denoiser, rows: int) -> Tensor | None:
    return None if model.classes is None else torch.arange(rows) % 4


def watch(model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Tokens that went through the trunk at every call, and those that had to."""
    went, needed = [], []
    first = (model.encoder if hasattr(model, "encoder") else model.blocks)[0]
    first.register_forward_hook(lambda module, inputs, output: went.append(len(output)))
    original = model.hidden

    def hidden(state: State, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        rows = zip(state.lengths, lengths, strict=True)
        if hasattr(model, "encoder"):
            needed.append(sum(known + model.registers // 2 for known, asked in rows if asked))
        else:
            needed.append(sum(L + model.registers for _, asked in rows if asked))
        return original(state, positions, lengths)

    monkeypatch.setattr(model, "hidden", hidden)
    return went, needed


@pytest.mark.parametrize("steps", [5, 40, 1000])
def test_only_rows_that_reveal_something_are_computed(
    model: Denoiser, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    went, needed = watch(model, monkeypatch)
    few = sample(model, SamplingRequest(4, steps, 7, "binomial", condition=labels(model, 4)))
    assert went == needed
    # As if every row had to be computed at every step: the same samples from more work.
    monkeypatch.setattr(State, "active", lambda state, lengths: (state, list(lengths)))
    done = sum(went)
    went.clear()
    assert torch.equal(
        few, sample(model, SamplingRequest(4, steps, 7, "binomial", condition=labels(model, 4)))
    )
    assert sum(went) > 1.5 * done if steps >= 40 else sum(went) >= done


def test_a_sample_is_the_same_in_any_batch_on_a_fine_grid(model: Denoiser) -> None:
    classes = labels(model, 5)
    together = sample(model, SamplingRequest(5, 60, 3, "binomial", condition=classes))
    for first, count in ((0, 1), (1, 3), (4, 1)):
        some = None if classes is None else classes[first : first + count]
        assert torch.equal(
            together[first : first + count],
            sample(
                model,
                SamplingRequest(
                    count, 60, 3, "binomial", condition=some, indices=range(first, first + count)
                ),
            ),
        )


def test_nothing_asked(model: Denoiser) -> None:
    state = model.open(2, labels(model, 2))
    model.extend(state, torch.tensor([1, 2, 3]), torch.tensor([0, 5, 2]), [2, 1])
    assert model.hidden(state, torch.tensor([], dtype=torch.int64), [0, 0]).shape == (0, 16)


def test_the_cache_of_an_autoregressive_row_waits_until_it_is_asked() -> None:
    model = randomised(ARConfig(kind="ar", blocks=2, **SIZES), V, L).double()
    went = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: went.append(len(output)))
    state = model.open(2)
    at = torch.tensor
    model.extend(state, at([1, 2, 3]), at([0, 1, 0]), [2, 1])
    model.hidden(state, at([2]), [1, 0])
    model.extend(state, at([4]), at([1]), [0, 1])
    both = model.hidden(state, at([2, 2]), [1, 1])
    assert went == [3, 3], "the start and two tokens of each row, when it was asked"
    fresh = model.open(1)
    model.extend(fresh, at([3, 4]), at([0, 1]), [2])
    torch.testing.assert_close(both[1:], model.hidden(fresh, at([2]), [1]), atol=1e-12, rtol=0)
