"""Seeds of random generators that are made of several values."""

import hashlib
from collections.abc import Sequence

import numpy as np


def mix_seed(*numbers: int) -> int:
    """Mix numbers into one seed.

    Args:
        *numbers: non-negative integers; other numbers, or another order, give another seed.

    Returns:
        A 64-bit seed.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def text_seed(seed: int, *texts: Sequence[int]) -> int:
    """Mix a seed with the token ids of texts into one seed.

    Args:
        seed: of the run.
        *texts: token ids of each text; moving an id from one text to the next changes the seed.

    Returns:
        A 64-bit seed that depends on these ids alone, not on what else is in a batch.
    """
    digest = hashlib.sha256(repr((seed, [[int(i) for i in ids] for ids in texts])).encode())
    return int.from_bytes(digest.digest()[:8])
