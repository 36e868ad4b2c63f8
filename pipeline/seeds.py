"""Seeds of random generators that are made of several values."""

import hashlib
from collections.abc import Sequence

import numpy as np


def mix_seed(*numbers: int) -> int:
    """Mix non-negative integers into one 64-bit seed; other numbers, or another order, give another seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def text_seed(seed: int, *texts: Sequence[int]) -> int:
    """Mix a seed with the token ids of texts into one 64-bit seed.

    Args:
        seed: of the run.
        texts: token ids; where a text ends matters, so moving an id from one text to the next changes the seed.

    Returns:
        A seed that does not depend on which other texts are in the batch.
    """
    digest = hashlib.sha256(repr((seed, [[int(i) for i in ids] for ids in texts])).encode())
    return int.from_bytes(digest.digest()[:8])
