"""The base class of all sections of a config."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A section of a config: unknown keys are errors and values do not change after loading.

    The `Attributes:` of a section's docstring are the descriptions of its keys in docs/configuration.md.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_for_numbers(cls, tree: Any) -> Any:
        for key, value in tree.items() if isinstance(tree, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and field.annotation in (int, float):
                raise ValueError(f"{key} is {str(value).lower()}; expected a number")
        return tree

    def conflicts(self) -> list[str]:
        """Return the problems between several keys, as `key: message` lines."""
        return list(self._conflicts())

    def _conflicts(self) -> Iterable[str]:
        return ()
