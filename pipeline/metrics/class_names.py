"""Classes by the names that the data gives them."""

from collections.abc import Sequence

from pipeline.config.evaluation import SamplingConfig
from pipeline.errors import ConfigError, did_you_mean

_NAMED = 10  # classes in a message


def with_class_ids(settings: SamplingConfig, names: Sequence[str] | None) -> SamplingConfig:
    """Replace names of classes in the settings by their numbers.

    Args:
        settings: of the sampling.
        names: of the classes, by number; None: they have none.

    Raises:
        ConfigError: no class has a name of the settings.
    """
    if all(isinstance(label, int) for label in settings.labels or ()):
        return settings
    return settings.model_copy(update={"labels": tuple(class_ids(settings.labels or (), names))})


def class_ids(
    labels: Sequence[int | str], names: Sequence[str] | None, key: str = "sampling.labels"
) -> list[int]:
    """Convert class labels, which may be names, to numbers.

    Args:
        labels: numbers or names.
        names: of the classes, by number; None: they have none.
        key: that the labels come from, for messages.

    Raises:
        ConfigError: no class has one of the names.
    """
    numbers = {name: number for number, name in enumerate(names or ())}
    for label in labels:
        if isinstance(label, str) and label not in numbers:
            known = f"known: {', '.join(list(numbers)[:_NAMED])}{', ...' * (len(numbers) > _NAMED)}"
            expected = known if numbers else "the model's classes have no names; expected numbers"
            raise ConfigError(f"{key}: {label!r}: no such class{did_you_mean(label, numbers)}; {expected}")
    return [numbers[label] if isinstance(label, str) else int(label) for label in labels]
