"""Seeds: fixed over versions, so that a run and a sample can be repeated."""

from pipeline.seeds import mix_seed, text_seed


def test_seeds_are_those_of_earlier_versions() -> None:
    assert mix_seed(5, 8, 0) >> 1 == 4997027695084040268  # dropout of seed 4, step 7, a missing row
    assert mix_seed(3, 8) == 5656544618678593650  # window 8 of a long sample
    assert text_seed(3, [1, 2], [5]) == 4928184727910543880


def test_other_values_give_other_seeds() -> None:
    seeds = [
        mix_seed(1, 2),
        mix_seed(2, 1),
        mix_seed(1, 2, 1),
        mix_seed(0, 1, 2),
        text_seed(1, [2]),
        text_seed(2, [1]),
    ]
    seeds += [text_seed(1, [2, 3]), text_seed(1, [2], [3])]
    assert len({*seeds}) == len(seeds)
