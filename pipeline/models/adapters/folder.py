"""Adapter folders: model folders with factors in place of weights, which name the model that they adapt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.models import model_folder
from pipeline.models.vq import digest


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to.

    Attributes:
        name: path or name of the model.
        hash: of its weights.
    """

    name: str
    hash: str

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Check that the model has the weights that the adapter was trained with.

        Args:
            weights: of the model, by name.

        Raises:
            CheckpointError: they are others.
        """
        if hash_of(weights) != self.hash:
            raise CheckpointError(
                f"base: {self.name!r} has other weights than the adapter was trained with; expected those of hash "
                f"{self.hash[:12]}"
            )


def hash_of(weights: Mapping[str, Tensor]) -> str:
    """Return the hash of a model's weights.

    Args:
        weights: by name.
    """
    return digest("weights", weights)


def read_base(folder: Path) -> Base:
    """Read which model the adapter of a folder belongs to.

    Args:
        folder: of the adapter.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    match model_folder.read_tree(folder).get("base"):
        case {"name": str(name), "hash": str(digest_of_weights)}:
            return Base(name, digest_of_weights)
        case other:
            path = folder / model_folder.CONFIG
            raise CheckpointError(f"{path} is damaged: base: {other!r}; expected its name and hash")
