"""What a user can get wrong. Every message names key, value, what was expected and the nearest choice."""

import difflib
from collections.abc import Iterable


class PipelineError(Exception):
    """Base of all errors that a user can mend; jobs print its message without a traceback."""


class ConfigError(PipelineError, ValueError):
    """A key, a type, a value or a combination in the run's config is wrong."""


class DataError(PipelineError, ValueError):
    """Documents, shards or manifest are missing, damaged or do not fit the model."""


class CheckpointError(PipelineError, RuntimeError):
    """A checkpoint or a model folder is missing, damaged or belongs to another run."""


class TrainingError(PipelineError, RuntimeError):
    """Training cannot go on as configured: the loss or the gradient is not finite."""


class StoppedError(TrainingError):
    """It ended before its time because the user asked; the same command goes on."""


class CapabilityError(PipelineError, RuntimeError):
    """The model, or the machine, cannot do what was asked."""


def did_you_mean(written: object, choices: Iterable[object]) -> str:
    """``; did you mean 'x'?`` for the choice nearest to what was written, else an empty string."""
    near = difflib.get_close_matches(str(written), [str(c) for c in choices], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
