"""No information passes between a group's tokens and that group's own predictions: what makes PGM a PGM."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.models import attention
from pipeline.models.attention import Segments
from pipeline.models.batch import Batch
from pipeline.models.blocks import GroupSwap, Layout, Stored
from pipeline.models.pgm import PGM as PartitionModel
from pipeline.models.pgm import Encoded
from tests.support.small_models import PGM, random_rows, randomised, shake

V = 12  # group 0 uses ids below V / 2, group 1 those from V / 2: the embedding's gradient tells them apart


def partitioned(rows: int, length: int, equal: bool) -> tuple[Tensor, Tensor]:
    """Tokens whose ids name their group, and groups; `equal`: both groups of every row have one size."""
    tokens, groups = random_rows(rows, length, V // 2)
    if equal:
        groups = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)).argsort(1) < length // 2
    return tokens + groups * (V // 2), groups


def losses_of(model: PartitionModel, tokens: Tensor, groups: Tensor, group: int) -> Tensor:
    """The training loss of one group's tokens, all of which the training form predicts."""
    asked = groups == bool(group)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(tokens.shape, generator=generator) * asked
    return model(Batch(tokens, groups, torch.ones_like(groups), weights)).sum()


def check_gradients(model: PartitionModel, tokens: Tensor, groups: Tensor) -> None:
    """Exactly zero gradient from one group's predictions to its own tokens, for logits and for losses."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(*tokens.shape, V, generator=generator)
    for group in (0, 1):
        of_group = groups == bool(group)
        logits = model.logits(tokens, groups)
        for outcome in ((logits * direction)[of_group].sum(), losses_of(model, tokens, groups, group)):
            (gradient,) = torch.autograd.grad(outcome, model.embedding.weight)
            by_id = gradient.abs().sum(1).view(2, -1)  # [group, id]
            assert by_id[group].eq(0).all(), f"leak: group {group} reaches its own predictions' gradient"
            assert by_id[1 - group].gt(0).all(), f"group {group} is not predicted from the other group"


def check_values(model: PartitionModel, tokens: Tensor, groups: Tensor) -> None:
    """Other tokens in one group: its own logits stay bit-equal, the other group's change, other rows stay."""
    before = model.logits(tokens, groups)
    for group in (0, 1):
        changed = tokens.clone()
        first = torch.zeros_like(groups)
        first[0] = groups[0] == bool(group)  # one row only, all its tokens of this group
        changed[first] = V - 1 - changed[first]
        after = model.logits(changed, groups)
        other = groups[0] != bool(group)
        assert torch.equal(before[0][~other], after[0][~other]), f"leak: group {group} sees its own tokens"
        assert (before[0][other] != after[0][other]).any(-1).all()
        assert torch.equal(before[1:], after[1:]), "leak: rows see each other"


FORMS = {
    "_masked": (5, 16, False),
    "_each": (3, 200, False),
    "_equal": (4, 16, True),
}
CHECKS = [check_gradients, check_values]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("check", CHECKS)
def test_groups_do_not_see_themselves(
    form: str, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, length, equal = FORMS[form]
    kernel, calls = getattr(attention, form), []
    monkeypatch.setattr(attention, form, lambda *arguments: (calls.append(1), kernel(*arguments))[1])
    model = randomised(PGM, V, length)
    check(model, *partitioned(rows, length, equal))
    assert calls, "this form of the kernel did not run"


def test_forms_of_the_kernel_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(PGM, V, 32).double()
    tokens, groups = partitioned(4, 32, equal=False)
    batched = model.logits(tokens, groups)
    monkeypatch.setattr(attention, "SHORT", 0)
    torch.testing.assert_close(model.logits(tokens, groups), batched, atol=1e-9, rtol=0)


def test_hidden_tokens_are_not_read_when_only_they_are_asked() -> None:
    """The form that validation and masked sampling take: group 1 asked, group 0 known."""
    model = randomised(PGM, V, 16)
    tokens, groups = partitioned(5, 16, equal=False)
    loss = model(Batch(tokens, groups, groups, torch.ones(tokens.shape))).sum()
    (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
    assert gradient[V // 2 :].eq(0).all()
    assert gradient[: V // 2].abs().sum(1).gt(0).all()


class OwnMean(GroupSwap):
    """A leak: adds to a group's swapped vectors a trace of its own encoder outputs' mean."""

    def forward(
        self,
        encoded: Tensor,
        positions: Tensor,
        extent: int,
        q_segments: Segments,
        keys: Layout,
        stored: Stored | None = None,
    ) -> Tensor:
        out = super().forward(encoded, positions, extent, q_segments, keys, stored)
        k_segments = keys.segments
        own = q_segments.ids ^ 1  # keys lie group 0, group 1; queries group 1, group 0
        sums = encoded.new_zeros(len(k_segments), encoded.shape[1]).index_add(0, k_segments.ids, encoded)
        means = sums / torch.tensor(k_segments.lengths).clamp(min=1)[:, None]
        return out + 1e-3 * means[own]


class LeakySwap(PartitionModel):
    """A model with the leak above."""

    def __init__(self) -> None:
        super().__init__(PGM, V, 16)
        self.swap = OwnMean(PGM.hidden, PGM.heads, PGM.swap)


class LeakyEncoder(PartitionModel):
    """A model whose encoder attends over whole rows instead of within groups."""

    def __init__(self) -> None:
        super().__init__(PGM, V, 16)

    def _encode(self, tokens: Tensor, positions: Tensor, segments: Segments, condition: None) -> Encoded:
        rows = Segments([a + b for a, b in zip(segments.lengths[::2], segments.lengths[1::2], strict=True)])
        encoded = super()._encode(tokens, positions, rows, condition)
        return encoded._replace(layout=encoded.layout._replace(segments=segments))


@pytest.mark.parametrize("leaky", [LeakySwap, LeakyEncoder])
@pytest.mark.parametrize("check", CHECKS)
def test_a_planted_leak_is_found(leaky: type[PartitionModel], check: Callable[..., None]) -> None:
    with pytest.raises(AssertionError, match="leak"):
        check(shake(leaky()), *partitioned(5, 16, equal=False))
