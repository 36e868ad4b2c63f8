"""A source whose posterior is known exactly, as a Denoiser; and the roll-out of SDTT in its plainest form."""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.config.model import TrunkConfig
from pipeline.models.batch import Batch, State
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import Head
from pipeline.sampling.logits import draw_tokens


class Plain(Head):
    """A head for hidden vectors that are logits already."""

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size, vocab_size)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        assert targets is None
        return hidden


def markov(vocab_size: int, length: int, seed: int) -> np.ndarray:
    """Chances of all V ** L rows of a Markov chain with strongly dependent neighbours, an axis a position."""
    rng = np.random.default_rng(seed)
    first = rng.dirichlet(np.ones(vocab_size))
    transitions = rng.dirichlet(0.3 * np.ones(vocab_size), vocab_size) * 0.98 + 0.02 / vocab_size
    joint = first
    for _ in range(length - 1):
        joint = joint[..., None] * transitions
    return joint


class Known(Denoiser):
    """Log-probabilities of every position given any known ones, from a table of all contexts.

    Attributes:
        table: [(V + 1) ** L, L, V] by the code of a context, whose digits are 0 (unknown) or 1 + token.
        predicted: number of positions that each call predicts.
    """

    def __init__(self, joint: np.ndarray):
        vocab_size, length = joint.shape[0], joint.ndim
        super().__init__(TrunkConfig(hidden=2, heads=1), vocab_size, length, ids=vocab_size)
        self.head = Plain(vocab_size)
        self.predicted: list[int] = []
        self.digits = (vocab_size + 1) ** torch.arange(length)
        table = np.empty(((vocab_size + 1) ** length, length, vocab_size))
        for context in product(range(vocab_size + 1), repeat=length):
            given = joint
            for axis, digit in enumerate(context):
                if digit:
                    given = given.take([digit - 1], axis=axis)
            code = sum(d * int(w) for d, w in zip(context, self.digits, strict=True))
            for place in range(length):
                chances = given.sum(tuple(axis for axis in range(length) if axis != place)) / given.sum()
                known = len(chances) == 1  # a known position is never predicted
                table[code, place] = np.nan if known else np.log(chances)
        self.table = torch.from_numpy(table)

    def target_vectors(self, batch: Batch) -> Tensor:
        raise AssertionError("not trained")

    def logits(self, tokens: Tensor, groups: Tensor, condition: Tensor | None = None) -> Tensor:
        """Of group 1 from group 0; NaN elsewhere."""
        return self.table[self.code(tokens, ~groups)]

    def code(self, tokens: Int[Tensor, "B L"], known: Bool[Tensor, "B L"]) -> Int[Tensor, "B"]:
        """Which context every row is."""
        return ((tokens + 1) * known) @ self.digits

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q V"]:
        self.predicted.append(len(positions))
        rows = torch.arange(len(state.lengths))
        tokens, places = state.known()
        canvas = torch.zeros(len(rows), self.length, dtype=torch.int64)
        canvas[rows.repeat_interleave(torch.tensor(state.lengths)), places] = tokens + 1
        return self.table[(canvas @ self.digits).repeat_interleave(torch.tensor(list(lengths))), positions]


Predict = Callable[[Int[Tensor, "B L"], Bool[Tensor, "B L"]], Float[Tensor, "B L V"]]


def naive_roll_out(
    predict: Predict,
    tokens: Int[Tensor, "B L"],
    hidden: Bool[Tensor, "B L"],
    *,
    time: Float[Tensor, "B"],
    dt: float,
    noise: Float[Tensor, "B 2 L"],
    mistake: str = "",
) -> Float[Tensor, "Q V"]:
    """Log-probabilities collected from two ancestral steps, each a full pass that predicts everything.

    Args:
        predict: logits of all positions, of which the hidden ones count.
        mistake: "grid" takes the posterior at 1 - time, as the public code does; "swapped", "first" and "last"
            take the targets of the other step, or all of one step.
    """
    at = 1 - time if mistake == "grid" else time
    both, known = [], tokens
    revealed = hidden & (noise[:, 0] < dt / at[:, None])
    for step in range(2):
        logits = predict(known, hidden if step == 0 else hidden & ~revealed)
        both.append(logits.log_softmax(-1))
        if step == 0:
            drawn = draw_tokens(Plain(logits.shape[-1]), both[0][revealed], noise[:, 1][revealed]).tokens
            known = tokens.masked_scatter(revealed, drawn)
    of_first = {"swapped": ~revealed, "first": hidden, "last": ~hidden}.get(mistake, revealed)
    return torch.where(of_first[..., None], *both)[hidden]
