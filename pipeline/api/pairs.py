"""A trained model of images with captions: either from the other, both from nothing, and gaps in either."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from pipeline import arguments
from pipeline.api.tokens import TokenModel
from pipeline.data.tokenizers import PairTokenizer
from pipeline.errors import CapabilityError, ConfigError
from pipeline.metrics.given import GivenPair, read_file
from pipeline.metrics.likelihood import PARTS, Part, pair_nats
from pipeline.models.head import Modalities

Picture = str | Path | UInt8[np.ndarray, "h w 3"]
_DRAWS = 16  # of the bounds that choose among captions
_MOST_CANDIDATES = 1024
Pairs = tuple[list[str], UInt8[np.ndarray, "B S S 3"]]


class PairModel(TokenModel):
    """Methods of a model of images with captions, whose rows are a caption and the codes of its image."""

    def draw(self, captions: Sequence[str], **options: Any) -> UInt8[np.ndarray, "B S S 3"]:
        """Draw an image of every caption.

        Args:
            captions: one for each image.
            **options: further arguments of `sample`, such as `steps` and `seed`.

        Returns:
            [B, S, S, 3] RGB images.

        Raises:
            ConfigError: no captions, one that does not fit, or as in `sample`.
            CapabilityError: the model is not one of images with captions.

        Examples:
            >>> model = load_model("runs/pair_quickstart/model")
            >>> model.draw(["a thick three", "a thin seven, slanted to the right"]).shape
            (2, 8, 8, 3)
        """
        arguments.instance("captions", captions, list, tuple)
        given = [
            GivenPair(caption, keys=(f"captions[{number}]", "image"))
            for number, caption in enumerate(captions)
        ]
        return self._complete(given, **options)[1]

    def caption(self, images: Sequence[Picture], best_of: int = 1, **options: Any) -> list[str]:
        """Write a caption of every image.

        Args:
            images: files, or RGB pixels; they are cropped and resized to the model's square.
            best_of: captions that are drawn of every image, all at once; the one with the smallest bound on
                -log p(image | caption) is returned. That bound averages over 16 draws.
            **options: further arguments of `sample`, such as `filters` and `seed`.

        Returns:
            A caption of every image, up to its end of text.

        Raises:
            ConfigError: no images, `best_of` outside its bounds, or as in `sample`.
            CapabilityError: the model is not one of images with captions, or is autoregressive.
            DataError: a file is no image.

        Examples:
            >>> model = load_model("runs/pair_quickstart/model")
            >>> images = model.draw(["a thick three"])
            >>> captions = model.caption(images, filters=Filters(top_k=1))
            >>> len(captions)
            1
            >>> captions = model.caption(images, best_of=16)
        """
        arguments.integer("best_of", best_of, 1, _MOST_CANDIDATES)
        arguments.instance("images", images, list, tuple, np.ndarray)
        given = [
            GivenPair(image=_content(key, image), keys=("caption", key))
            for number, image in enumerate(images)
            for key in [f"images[{number}]"]
        ]
        rows = self._rows(given * best_of, **options)
        if best_of > 1:
            candidates = rows.cpu().numpy().reshape(best_of, len(given), -1)
            bounds = [pair_nats(self.denoiser, part, "caption", draws=_DRAWS, seed=0) for part in candidates]
            rows = torch.from_numpy(candidates[torch.stack(bounds).argmin(0), np.arange(len(given))])
        return self.pairs(rows)[0]

    def sample_pairs(self, num_samples: int = 4, **options: Any) -> Pairs:
        """Draw captions and their images, both from nothing.

        Args:
            num_samples: number of pairs.
            **options: further arguments of `sample`.

        Returns:
            The captions, and [B, S, S, 3] RGB images.

        Raises:
            ConfigError: as in `sample`.
            CapabilityError: the model is not one of images with captions.

        Examples:
            >>> model = load_model("runs/pair_quickstart/model")
            >>> captions, images = model.sample_pairs(2)
            >>> len(captions), images.shape
            (2, (2, 8, 8, 3))
        """
        self._pair  # noqa: B018  # the check, before time is spent
        return self.pairs(self.sample(num_samples, **options))

    def complete(
        self,
        caption: str | None = None,
        image: Picture | None = None,
        mask: str | Path | Bool[np.ndarray, "h w"] | None = None,
        num_samples: int = 1,
        **options: Any,
    ) -> Pairs:
        """Fill the gaps of a caption, of an image, or of both.

        Args:
            caption: whole, or with blanks: `[[2]]` stands for two tokens; None: all of it is drawn.
            image: a file, or RGB pixels; None: all of it is drawn.
            mask: of the image's size, white where it is drawn again, or booleans; None: the image is whole.
            num_samples: number of pairs.
            **options: further arguments of `sample`.

        Returns:
            The captions, and [B, S, S, 3] RGB images.

        Raises:
            ConfigError: nothing is left to draw, a caption that does not fit, or as in `sample`.
            CapabilityError: the model is not one of images with captions, or cannot draw in such places.
            DataError: a file is missing, or no image.

        Examples:
            >>> model = load_model("runs/pair_quickstart/model")
            >>> captions, images = model.complete("a[[1]] three", num_samples=2)
            >>> captions[0].startswith("a") and captions[0].endswith(" three")
            True
            >>> right = np.arange(8) >= np.full((8, 1), 4)  # the half that is drawn again
            >>> model.complete("a thick three", images[0], right)[1].shape
            (1, 8, 8, 3)
        """
        hidden = read_file("mask", mask) if isinstance(mask, str | Path) else mask
        if hidden is not None and not isinstance(hidden, bytes):
            hidden = arguments.booleans("mask", hidden, "h", "w").cpu().numpy()
        content = None if image is None else _content("image", image)
        arguments.integer("num_samples", num_samples, 1, 10**6)
        return self._complete([GivenPair(caption, content, hidden)] * num_samples, **options)

    def score_pairs(
        self,
        captions: Sequence[str],
        images: Sequence[Picture],
        given: Part = "image",
        draws: int = _DRAWS,
        seed: int = 0,
    ) -> list[float]:
        """Bound -log p(caption | image) of pairs in nats, or -log p(image | caption), or that of both together.

        Args:
            captions: one for each image.
            images: files, or RGB pixels.
            given: "image", "caption", or "nothing" for both together.
            draws: random draws that a bound averages over.
            seed: of the draws.

        Returns:
            The bound of every pair; exact for an autoregressive model.

        Raises:
            ConfigError: no pairs, not one caption for each image, or one that does not fit.
            CapabilityError: the model is not one of images with captions, or an autoregressive model and a given
                image.

        Examples:
            >>> model = load_model("runs/pair_quickstart/model")
            >>> image = model.draw(["a thick three"])[0]
            >>> scores = model.score_pairs(["a thick three", "a thin one"], [image, image], draws=4)
            >>> len(scores)
            2
        """
        tokenizer, modalities = self._pair
        arguments.instance("captions", captions, list, tuple)
        arguments.instance("images", images, list, tuple, np.ndarray)
        if not len(captions) or len(captions) != len(images):
            raise ConfigError(f"captions: {len(captions)} for {len(images)} images; expected one for each")
        rows = np.zeros((len(captions), self.length), np.int64)
        for number, (caption, image) in enumerate(zip(captions, images, strict=True)):
            keys = f"captions[{number}]", f"images[{number}]"
            whole = GivenPair(caption, keys=keys), GivenPair(image=_content(keys[1], image), keys=keys)
            for part in whole:
                known = part.tokens(tokenizer, modalities, self.length, ar=False).known
                rows[number, list(known)] = list(known.values())
        arguments.choice("given", given, PARTS)
        draws, seed = arguments.integer("draws", draws, 1, 10**6), arguments.integer("seed", seed, 0)
        return pair_nats(self.denoiser, rows, given, draws=draws, seed=seed).tolist()

    def pairs(self, tokens: Int[Tensor, "B L"]) -> Pairs:
        """Decode rows to captions and images.

        Args:
            tokens: rows, such as those of `sample`.

        Returns:
            The captions, each up to its end of text, and [B, S, S, 3] RGB images.

        Raises:
            ConfigError: no rows of L ids, or an id at a place of the other modality.
            CapabilityError: the model is not one of images with captions.

        Examples:
            >>> model = load_model("runs/pair_quickstart/model")
            >>> captions, images = model.pairs(model.sample(num_samples=2))
            >>> images.shape
            (2, 8, 8, 3)
        """
        tokenizer, (places, ids) = self._pair
        rows = arguments.integers("tokens", tokens, "B", self.length).cpu()
        arguments.check_below("tokens", rows[:, :places], ids)
        arguments.check_below("tokens", rows[:, places:] - ids, self.vocab_size - ids)
        return tokenizer.captions(rows.numpy(), places), tokenizer.images(rows.numpy(), places)

    def _complete(self, given: Sequence[GivenPair], **options: Any) -> Pairs:
        """Draw captions and images around what is given of every row."""
        return self.pairs(self._rows(given, **options))

    def _rows(self, given: Sequence[GivenPair], **options: Any) -> Int[Tensor, "B L"]:
        """Draw rows around what is given of each."""
        tokenizer, modalities = self._pair
        ar = self.denoiser.left_to_right
        known = [part.tokens(tokenizer, modalities, self.length, ar).known for part in given]
        return self.sample(len(known), known=known, **options)

    @property
    def _pair(self) -> tuple[PairTokenizer, Modalities]:
        """The tokenizers and the modalities, of a model of images with captions."""
        modalities = self.denoiser.head.modalities
        if modalities is None or not isinstance(self.tokenizer, PairTokenizer):
            raise CapabilityError("pairs: this model is not one of images with captions (data.kind: pair)")
        return self.tokenizer, modalities


def _content(key: str, image: Picture) -> bytes | UInt8[np.ndarray, "h w 3"]:
    """Read an image's file, or check its pixels."""
    return read_file(key, image) if isinstance(image, str | Path) else arguments.pixels(key, image)
