"""Work on actors: the order of answers, and errors that are the user's."""

import pytest

from pipeline.errors import CheckpointError, ConfigError
from pipeline.runtime.actors import Resources, in_order, started


def test_answers_and_errors(ray_cluster: None) -> None:
    class Counter:
        """Refuses negative numbers from the start, and 7 later."""

        def __init__(self, first: int):
            if first < 0:
                raise CheckpointError(f"{first}: no such first number")
            self.first = first

        def add(self, number: int) -> int:
            if number == 7:
                raise ConfigError("number: 7; expected another one")
            return self.first + number

    with started(Counter, (10,), Resources(2, 1, False), 1) as ready:
        assert len(ready) == 1
        assert list(in_order(ready, "add", [(n,) for n in (3, 1, 2)])) == [13, 11, 12]
        with pytest.raises(ConfigError) as caught:
            list(in_order(ready, "add", [(1,), (7,)]))
    assert str(caught.value) == "number: 7; expected another one"
    # Both CPUs are free again, although the error's frames still hold the actor.
    with (
        started(Counter, (-1,), Resources(2, 1, False), 5) as ready,
        pytest.raises(CheckpointError) as refused,
    ):
        list(in_order(ready, "add", [(1,)] * 5))
    assert str(refused.value) == "-1: no such first number"
