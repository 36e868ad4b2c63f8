"""Errors that a user can correct. Every message names key, value, what was expected and the nearest valid choice."""

import difflib
from collections.abc import Iterable


class PipelineError(Exception):
    """Base class of errors that a user can correct; jobs print their message without a traceback."""


class ConfigError(PipelineError, ValueError):
    """A key, a type, a value or a combination of values in a config is wrong."""


class DataError(PipelineError, ValueError):
    """Documents, shards or a manifest are missing, damaged or do not fit the model."""


class CheckpointError(PipelineError, RuntimeError):
    """A checkpoint or a model folder is missing, damaged or belongs to another run."""


class TrainingError(PipelineError, RuntimeError):
    """Training cannot continue as configured."""


class StoppedError(TrainingError):
    """A run was stopped before its end at the user's request; the same command continues it."""


class CapabilityError(PipelineError, RuntimeError):
    """The model or the machine does not support what was requested."""


def did_you_mean(written: object, choices: Iterable[object]) -> str:
    """Suggest the valid choice that is nearest to what the user wrote.

    Args:
        written: what the user wrote.
        choices: valid choices.

    Returns:
        `; did you mean 'x'?`, or an empty string if no choice is near.
    """
    near = difflib.get_close_matches(str(written), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type.

    Args:
        error: of any library.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kind_and_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message.

    Args:
        error: of any library.
    """
    return f"{type(error).__name__}: {first_line(error)}"


def printable(text: str) -> str:
    """Return a text on one line that UTF-8 can hold: line ends, control characters and lone surrogates are escaped.

    Args:
        text: may hold the name of a file or of a field, which can be anything.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
