"""A trained model of text or images as an object: texts, images and scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from pipeline import arguments
from pipeline.api.pairs import PairModel
from pipeline.api.tokens import Labels, Progress, SamplingOptions
from pipeline.data.templates import Message, prompt_text
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import CapabilityError, ConfigError
from pipeline.logs import progress_bar
from pipeline.metrics.continuations import Continuation, Pair, as_answers, score_continuations
from pipeline.metrics.given import filled, painted, prompted, read_file
from pipeline.models.vq import ImageTokenizer
from pipeline.sampling.orders import Order
from pipeline.sampling.row_ends import sample_rows, texts_of
from pipeline.sampling.sampler import MOST_SAMPLES, SamplingRequest, known_tokens, sample_long


class Model(PairModel):
    """A trained model with its tokenizer: tokens as in `TokenModel`, texts or images, and pairs as in `PairModel`.

    `load_model` makes it.
    """

    def sample_text(self, num_samples: int = 4, **options: Any) -> list[str]:
        """Draw texts.

        Args:
            num_samples: number of texts.
            **options: further arguments of `sample`.

        Returns:
            One text a sample, without BOS and end-of-text.

        Raises:
            ConfigError: as in `sample`.
            CapabilityError: the model is not one of text.

        Examples:
            >>> model = load_model("runs/quickstart/model")
            >>> texts = model.sample_text(2, steps=16, seed=1)
            >>> len(texts)
            2
        """
        self._text_tokenizer  # noqa: B018  # the check, before time is spent
        return self.decode(self.sample(num_samples, **options))

    def sample_images(
        self, labels: Labels = None, num_samples: int | None = None, **options: Any
    ) -> UInt8[np.ndarray, "B S S 3"]:
        """Draw images.

        Args:
            labels: class of every image, as a number or a name; None: images of no class.
            num_samples: number of images; None: one for each label, or 4.
            **options: further arguments of `sample`, such as `guidance`.

        Returns:
            [B, S, S, 3] RGB images.

        Raises:
            ConfigError: as in `sample`.
            CapabilityError: the model is not one of images, or has no classes.

        Examples:
            >>> model = load_model("runs/image_quickstart/model")
            >>> model.sample_images([3, 8], steps=12, order="halton", guidance=2.0).shape
            (2, 8, 8, 3)
        """
        self._image_tokenizer  # noqa: B018  # the check, before time is spent
        condition = self._labels(labels)
        if num_samples is None:
            num_samples = 4 if condition is None else len(condition)
            if not num_samples:
                raise ConfigError("labels: an empty list; expected a class for each image")
        return self.images(self.sample(num_samples, condition=condition, **options))

    def write(
        self,
        prompt: str = "",
        num_samples: int = 1,
        length: int | None = None,
        stride: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        order: str | Order | None = None,
        progress: Progress = False,
        **options: Unpack[SamplingOptions],
    ) -> list[str]:
        """Continue a prompt to `length` tokens or to the end of the text, also beyond L.

        A model of prompts and answers writes its answer behind the prompt, up to the end of text; see `answer`.

        Args:
            prompt: beginning of every text.
            num_samples: number of texts.
            length: tokens, BOS and prompt included; None: L. A model of padded rows ends its texts within L.
            stride: new tokens of every window after the first; None: half of L.
            steps: forward passes of a full window, or of a block of an answer; None: 64, or one for each token of an
                autoregressive model.
            seed: text i depends on (seed, i) only.
            order: as in `sample`.
            progress: as in `sample`.
            **options: as in `sample`.

        Returns:
            The texts, with the prompt.

        Raises:
            ConfigError: a prompt longer than a row or than `length`, a stride that leaves no context, or a value
                outside its bounds.
            CapabilityError: the model is not one of text.

        Examples:
            >>> model = load_model("runs/quickstart/model")
            >>> text = model.write("A class is", length=100, steps=16)[0]
            >>> text.startswith("A class is")
            True
        """
        tokenizer, window = self._text_tokenizer, self.denoiser.length
        template = "plain" if self.ends is None else self.ends.template
        given = prompted(prompt, tokenizer, window, self.bos, template=template)
        least = window - given.unknown + 1
        length = window if length is None else arguments.integer("length", length, least, 10**9)
        stride = window // 2 if stride is None else arguments.integer("stride", stride, 1)
        if steps is None:
            steps = window if self.denoiser.left_to_right else 64
        arguments.integer("num_samples", num_samples, 1, MOST_SAMPLES)
        request = SamplingRequest(
            num_samples,
            min(arguments.integer("steps", steps, 1), given.unknown),
            seed,
            order=self._order if order is None else order,
            bos=self.bos,
            known=known_tokens(given.known, num_samples, window),
            **options,
        )
        bar, longest = progress_bar(progress, "steps"), max(window, length)
        if self.ends is not None:
            return self.decode(sample_rows(self.denoiser, request, self.ends, progress=bar)[:, :length])
        rows = sample_long(
            self.denoiser, request, length=longest, stride=stride, stop=tokenizer.eot, progress=bar
        )
        return self.decode(rows[:, :length])

    def answer(
        self, prompts: Sequence[str], steps: int | None = None, seed: int = 0, **options: Any
    ) -> list[str]:
        """Answer prompts with a model that was trained on prompts and answers.

        Args:
            prompts: to be answered, as in the training data, without what the template adds.
            steps: forward passes of a block; None: one for each token.
            seed: the answer to prompt i depends on (seed, i) only.
            **options: further arguments of `sample`.

        Returns:
            An answer to every prompt, up to the end of text or of the row.

        Raises:
            ConfigError: no prompts, a prompt that fills its row, or as in `sample`.
            CapabilityError: the model was not trained on prompts and answers.

        Examples:
            >>> model = load_model("runs/finetune_exercises/model")
            >>> answers = model.answer(["reverse lomen:", "sort lomen:"], steps=2)
            >>> len(answers)
            2
        """
        tokenizer, ends = self._text_tokenizer, self.answer_ends
        if ends is None:
            raise CapabilityError(
                "answer: the model was not trained on prompts and answers; `write` continues a text"
            )
        arguments.instance("prompts", prompts, list, tuple)
        given = [
            prompted(prompt, tokenizer, self.length, self.bos, f"prompts[{number}]", ends.template).known
            for number, prompt in enumerate(prompts)
        ]
        bos = {} if self.bos is None else {0: self.bos}
        steps = ends.block if steps is None else steps
        rows = self.sample(len(prompts), steps, seed=seed, known=[bos | known for known in given], **options)
        answers = []
        for row, known in zip(rows.tolist(), given, strict=True):
            ids = row[len(bos) + len(known) :]
            answers.append(tokenizer.decode(ids[: ids.index(ends.eot)] if ends.eot in ids else ids))
        return answers

    def infill(self, template: str, num_samples: int = 1, **options: Any) -> list[str]:
        """Fill in the blanks of a text.

        Args:
            template: text with blanks; `[[12]]` is a blank of 12 tokens.
            num_samples: number of texts.
            **options: further arguments of `sample`.

        Returns:
            The texts, without what the model draws behind the template.

        Raises:
            ConfigError: no blank, or a text longer than a row.
            CapabilityError: the model is not one of text, or is autoregressive and text follows a blank.

        Examples:
            >>> model = load_model("runs/quickstart/model")
            >>> model.infill("The method [[12]] is called.", steps=4)[0].endswith(" is called.")
            True
        """
        ar = self.denoiser.left_to_right
        given = filled(template, self._text_tokenizer, self.denoiser.length, self.bos, ar)
        return self.decode(self.sample(num_samples, known=given.known, **options)[:, : given.end])

    def inpaint(
        self,
        image: str | Path | UInt8[np.ndarray, "h w 3"],
        mask: str | Path | Bool[np.ndarray, "h w"],
        num_samples: int = 1,
        **options: Any,
    ) -> UInt8[np.ndarray, "B S S 3"]:
        """Draw a part of an image again.

        The image is cropped and resized to the model's square. Tokens whose squares have a masked pixel are drawn;
        the others are kept, and decoded with them.

        Args:
            image: a file, or RGB pixels.
            mask: a file of the image's size that is white where the image is drawn again, or booleans.
            num_samples: number of images.
            **options: further arguments of `sample`, such as `condition`.

        Returns:
            [B, S, S, 3] RGB images.

        Raises:
            CapabilityError: the model is not one of images, or is autoregressive.
            ConfigError: sizes that differ, or a mask without white.
            DataError: a file is missing, or no image.

        Examples:
            >>> model = load_model("runs/image_quickstart/model")
            >>> digit = model.sample_images([3], steps=12)[0]
            >>> lower = np.arange(8)[:, None] >= np.full(8, 4)  # the half that is drawn again
            >>> model.inpaint(digit, lower, num_samples=2, condition=[8, 8]).shape
            (2, 8, 8, 3)
        """
        tokenizer = self._image_tokenizer
        if self.denoiser.left_to_right:
            raise CapabilityError("inpaint: expected a pgm or mdlm of images, with its tokenizer")
        content = (
            read_file("image", image) if isinstance(image, str | Path) else arguments.pixels("image", image)
        )
        hidden = (
            read_file("mask", mask)
            if isinstance(mask, str | Path)
            else arguments.booleans("mask", mask, "h", "w").cpu().numpy()
        )
        given = painted(content, hidden, tokenizer, self.denoiser.length, self.bos)
        return self.images(self.sample(num_samples, known=given.known, **options))

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        draws: int = 32,
        seed: int = 0,
        progress: Progress = False,
    ) -> list[Continuation]:
        """Bound -log p(continuation | prompt) of texts in nats; exact for an autoregressive model.

        A model of prompts and answers scores a continuation as a whole answer, with the end of text that follows it.

        Args:
            pairs: (prompt, continuation).
            draws: random draws that a bound averages over.
            seed: of the draws.
            progress: True shows a progress bar; a function is called with (pairs done, pairs).

        Returns:
            The bound of every continuation, with its standard error.

        Raises:
            ConfigError: an empty continuation, a pair longer than a row, or a value outside its bounds.
            CapabilityError: the model is not one of text.

        Examples:
            >>> model = load_model("runs/quickstart/model")
            >>> likely, unlikely = model.score([("A class is", " a type."), ("A class is", " #]#]")])
            >>> likely.tokens > 0 and likely.nats > 0
            True
        """
        arguments.instance("pairs", pairs, list, tuple)
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"pairs: {pair!r}; expected a prompt and a continuation")
        arguments.integer("draws", draws, 1, 10**6)
        arguments.integer("seed", seed, 0)
        texts = [arguments.text("pairs", text) for pair in pairs for text in pair]
        ends = self.answer_ends
        if ends is not None:
            texts[::2] = [prompt_text([Message("user", prompt)], ends.template) for prompt in texts[::2]]
        ids = self._text_tokenizer.encode_batch(texts)
        rows = [list(map(int, row)) for row in ids]
        tokens: list[Pair] = list(zip(rows[::2], rows[1::2], strict=True))
        if ends is not None:
            tokens = as_answers(tokens, ends, self.length - (self.bos is not None))
        return score_continuations(
            self.denoiser,
            tokens,
            draws=draws,
            seed=seed,
            bos=self.bos,
            progress=progress_bar(progress, "pairs"),
            whole=ends is not None,
        )

    def decode(self, tokens: Int[Tensor, "B L"]) -> list[str]:
        """Decode rows of ids to texts.

        Args:
            tokens: ids, BOS included.

        Returns:
            One text a row, without BOS and end-of-text.

        Raises:
            CapabilityError: the model is not one of text.
            ConfigError: no rows, or an id outside the tokenizer's vocabulary.

        Examples:
            >>> model = load_model("runs/quickstart/model")
            >>> model.decode([[model.bos, *model.tokenizer.encode("A class")]])
            ['A class']
        """
        tokenizer = self._text_tokenizer
        special, tokens = {self.bos, tokenizer.eot}, arguments.integers("tokens", tokens, "B", "L")
        begins = tokens == (tokenizer.eot if self.bos is None else self.bos)
        arguments.check_below("tokens", tokens[~begins], tokenizer.vocab_size)
        if self.ends is not None:
            return texts_of(tokens.cpu().numpy(), self.ends.eot, self.ends.pad, tokenizer.decode)
        return [tokenizer.decode([i for i in row if i not in special]) for row in tokens.tolist()]

    def images(self, tokens: Int[Tensor, "B L"]) -> UInt8[np.ndarray, "B S S 3"]:
        """Decode rows of codes to images.

        Args:
            tokens: codes, BOS included.

        Returns:
            [B, S, S, 3] RGB images of side S.

        Raises:
            CapabilityError: the model is not one of images, or has no tokenizer.
            ConfigError: no rows of L codes.

        Examples:
            >>> model = load_model("runs/image_quickstart/model")
            >>> model.images(model.sample(num_samples=2, steps=12, condition=[3, 8])).shape
            (2, 8, 8, 3)
        """
        tokenizer = self._image_tokenizer
        codes = arguments.integers("tokens", tokens, "B", self.length)[:, int(self.bos is not None) :].cpu()
        arguments.check_below("tokens", codes, tokenizer.codes)
        return tokenizer.decode(codes.numpy())

    @property
    def _text_tokenizer(self) -> Tokenizer:
        """The tokenizer, which must be one of text."""
        if not isinstance(self.tokenizer, Tokenizer):
            raise CapabilityError(
                "text: this model has no text tokenizer; `images` decodes the tokens of image models"
            )
        return self.tokenizer

    @property
    def _image_tokenizer(self) -> ImageTokenizer:
        """The tokenizer, which must be one of images."""
        if not isinstance(self.tokenizer, ImageTokenizer):
            raise CapabilityError("images: this model has no image tokenizer; expected one of image data")
        return self.tokenizer
