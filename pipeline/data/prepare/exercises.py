"""Prompts of which exactly one answer is right: to write a word from its end, or to sort its letters."""

import functools

import numpy as np

_SEED, _WORDS = 2026, 8000
_LENGTHS = (3, 4, 5, 6)
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


@functools.cache
def documents() -> list[dict[str, str]]:
    """Return the exercises, in random order, with the fields `prompt` and `answer`."""
    rng = np.random.default_rng(_SEED)
    words = list(dict.fromkeys(_word(rng) for _ in range(_WORDS)))
    exercises = [
        (f"reverse {word}:", word[::-1]) if index % 2 else (f"sort {word}:", "".join(sorted(word)))
        for index, word in enumerate(words)
    ]
    order = rng.permutation(len(exercises))
    return [{"prompt": prompt, "answer": answer} for prompt, answer in (exercises[i] for i in order.tolist())]


def _word(rng: np.random.Generator) -> str:
    """Draw a word that can be pronounced: consonants and vowels in turn."""
    first, letters = rng.integers(2), []
    for place in range(rng.choice(_LENGTHS)):
        kind = _VOWELS if (place + first) % 2 else _CONSONANTS
        letters.append(kind[rng.integers(len(kind))])
    return "".join(letters)
