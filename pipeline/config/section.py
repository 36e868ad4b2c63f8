"""The base class of all sections of a config."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

END_OF_INTEGERS = 2**63  # PyTorch, NumPy and databases hold integers below it

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=END_OF_INTEGERS)]
# A name becomes a part of the names of folders, which file systems limit to 255 bytes.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]


class Section(BaseModel):
    """A section of a config: unknown keys are errors and values do not change after loading.

    The `Attributes:` of a section's docstring are the descriptions of its keys in docs/configuration.md.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, str_min_length=1
    )

    @model_validator(mode="before")
    @classmethod
    def _read_booleans_as_words(cls, tree: Any) -> Any:
        """Let keys for numbers refuse booleans, which pydantic would convert: YAML reads `on` and `yes` as true."""
        if not isinstance(tree, dict):
            return tree
        numeric = {name for name, field in cls.model_fields.items() if _is_numeric(field.annotation)}
        return {key: _words(value) if key in numeric else value for key, value in tree.items()}

    @field_validator("*", mode="after")
    @classmethod
    def _check_limits(cls, value: Any) -> Any:
        for leaf in _leaves(value):
            if isinstance(leaf, int) and abs(leaf) >= END_OF_INTEGERS:
                raise ValueError(f"{leaf}; expected an integer below 2^63")
            if isinstance(leaf, str) and "\0" in leaf:
                raise ValueError(f"{leaf!r}; expected text without NUL characters")
        return value

    def conflicts(self) -> list[str]:
        """Return the problems between several keys, as `key: message` lines."""
        return list(self._conflicts())

    def _conflicts(self) -> Iterable[str]:
        return ()


def _is_numeric(annotation: Any) -> bool:
    """Return whether an annotation names numbers and no booleans, in unions and containers too."""
    kinds = list(_kinds_in(annotation))
    return bool not in kinds and (int in kinds or float in kinds)


def _kinds_in(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _kinds_in(part)


def _words(value: Any) -> Any:
    """Return a value with its booleans as words, in lists too."""
    if isinstance(value, list | tuple):
        return [_words(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values in tuples and mappings of any depth; sections check their own."""
    if isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value
