"""The Python interface: `load_model`, and the model object with its logits, predictions and samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from pipeline import arguments, tracking, trained
from pipeline.config.evaluation import Precision
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import CapabilityError, ConfigError, did_you_mean
from pipeline.metrics.class_names import class_ids
from pipeline.metrics.continuations import Continuation, score_continuations
from pipeline.metrics.given import filled, painted, prompted, read_file
from pipeline.models.denoiser import DTYPES, Denoiser
from pipeline.models.vq import ImageTokenizer
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from pipeline.sampling.row_ends import RowEnds, sample_rows, texts_of
from pipeline.sampling.sampler import Known, Progress, SamplingRequest, known_tokens, sample_long


class SamplingOptions(TypedDict, total=False):
    """Further keyword arguments of `Model.sample`, with the defaults of `SamplingRequest`.

    Attributes:
        filters: temperature, top-k and nucleus.
        refresh_every: steps from one encoding of all known tokens to the next, for a PGM with a bidirectional
            encoder; 1 is exact.
        guidance: weight w of classifier-free guidance at the last step, reached linearly from 0 at the first; a
            single step has all of w. Requires `condition`.
        compile: compile the steps on CUDA, for AR and for a causal PGM without pooled swaps, in planned orders.
    """

    filters: Filters
    refresh_every: int
    guidance: float
    compile: bool


Labels = Int[Tensor, "B"] | Sequence[int | str] | None


class Model:
    """A trained model with its tokenizer.

    Args:
        denoiser: the network, which is put into eval mode.
        bos: id that stands known at position 0 of every row, or None.
        tokenizer: converts rows to text or images; None for data without one.
        class_names: by label; None: the classes have no names.
        ends: how rows end that have padding; None: rows have none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        bos: int | None = None,
        tokenizer: Tokenizer | ImageTokenizer | None = None,
        class_names: Sequence[str] | None = None,
        ends: RowEnds | None = None,
    ):
        self.denoiser = denoiser.eval()
        self.bos, self.tokenizer, self.class_names, self.ends = bos, tokenizer, class_names, ends
        self._order = "left_to_right" if denoiser.left_to_right else "uniform"

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.denoiser.head.weight.device

    def to(self, device: torch.device | str) -> "Model":
        """Move the model to a device.

        Args:
            device: where to compute; inputs may be on any device.

        Returns:
            The model itself.

        Raises:
            CapabilityError: this machine has no such device.
        """
        self.denoiser.to(arguments.device(device))
        return self

    @torch.inference_mode()
    def logits(
        self,
        tokens: Int[Tensor, "B L"],
        groups: Int[Tensor, "B L"] | Bool[Tensor, "B L"],
        condition: Int[Tensor, "B"] | None = None,
        order: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Compute logits at every position from the tokens of the other group (masked models: two passes).

        Args:
            tokens: ids below V; L includes BOS where the data has one.
            groups: 0 or 1 for every token.
            condition: class labels; None: without class.
            order: rank of every token in its row's order of revelation, which a causal encoder reads it in; None:
                ascending positions.

        Shape:
            tokens, groups, order: [B, L]; condition: [B].

        Returns:
            [B, L, V] float32.

        Raises:
            CapabilityError: an autoregressive model, which has no groups; `predict` gives its next tokens.
            ConfigError: rows longer than L, an id that the model does not read, a group other than 0 and 1, or an
                order that does not rank every position once.

        Source:
            arXiv 2505.18883, section 4.
        """
        tokens = arguments.integers("tokens", tokens, "B", "L")
        if tokens.shape[1] > self.denoiser.length:
            raise ConfigError(f"tokens: rows of {tokens.shape[1]}; expected at most {self.denoiser.length}")
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        arguments.check_ids("tokens", tokens, places, self.denoiser.vocab_size, self.bos)
        groups = arguments.booleans("groups", groups, *tokens.shape)
        if order is not None:
            order = arguments.integers("order", order, *tokens.shape).cpu()
            ranks = torch.arange(tokens.shape[1]).expand(tokens.shape)
            if not torch.equal(order.sort(-1).values, ranks):
                raise ConfigError(f"order: expected the ranks 0 to {tokens.shape[1] - 1} once in every row")
        return self.denoiser.logits(
            tokens.to(self.device), groups.to(self.device), self._labels(condition), order
        )

    @torch.inference_mode()
    def predict(
        self,
        known: Int[Tensor, "B K"],
        positions: Int[Tensor, "B K"],
        lengths: Int[Tensor, "B"],
        queries: Int[Tensor, "B Q"],
        query_lengths: Int[Tensor, "B"] | None = None,
        condition: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B Q V"]:
        """Compute logits at query positions from known tokens alone.

        Args:
            known: ids of known tokens, padded to the longest row; a causal encoder reads them in this order.
            positions: of the known tokens.
            lengths: number of known tokens in every row, 0 allowed.
            queries: positions to predict, padded to the longest row.
            query_lengths: number of queries in every row; None: all of them.
            condition: class labels; None: without class.

        Shape:
            known, positions: [B, K]; queries: [B, Q]; lengths, query_lengths, condition: [B].

        Returns:
            [B, Q, V] float32, 0 in the padding.

        Raises:
            ConfigError: a position outside the row, known twice, or both known and queried; an id that the model does
                not read; or a length beyond the padded width.
            CapabilityError: labels or positions that the model cannot use.
        """
        length, condition = self.denoiser.length, self._labels(condition)
        queries = arguments.integers("queries", queries, "B", "Q").cpu()
        known = arguments.integers("known", known, len(queries), "K").cpu()
        positions = arguments.integers("positions", positions, *known.shape).cpu()
        state = self.denoiser.open(len(queries), condition, capacity=known.shape[1])
        known_mask = arguments.present("positions", positions, lengths, length)
        query_mask = arguments.present("queries", queries, query_lengths, length)
        arguments.check_ids(
            "known", known[known_mask], positions[known_mask], self.denoiser.vocab_size, self.bos
        )
        arguments.check_distinct(positions, known_mask, queries, query_mask, length)
        tokens, places, targets = (
            values[mask].to(self.device)
            for values, mask in ((known, known_mask), (positions, known_mask), (queries, query_mask))
        )
        self.denoiser.extend(state, tokens, places, known_mask.sum(1).tolist())
        logits = self.denoiser.head(self.denoiser.hidden(state, targets, query_mask.sum(1).tolist()))
        out = logits.new_zeros(*queries.shape, self.denoiser.vocab_size)
        out[query_mask.to(self.device)] = logits
        return out

    def sample(
        self,
        num_samples: int = 4,
        steps: int | None = None,
        order: str | Order | None = None,
        seed: int = 0,
        condition: Labels = None,
        progress: Progress | None = None,
        known: Known | None = None,
        length: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Int[Tensor, "B L"]:
        """Draw rows of tokens.

        Args:
            num_samples: number of rows.
            steps: number of forward passes; None: 64, or the number of positions to draw if that is smaller or the
                model is autoregressive.
            order: a name, or an `Order` with its settings; None: "uniform", or "left_to_right" for an
                autoregressive model.
            seed: sample i depends on (seed, i) only.
            condition: class labels, [num_samples], which a list may give by name; None: without class.
            progress: called with (steps done, steps) after every step.
            known: given tokens: `{position: token}` for all samples, a list of one for each, or (tokens, mask), both
                [num_samples, L]. They are kept, and everything else is drawn around them.
            length: tokens of every row, for a model of padded rows; None: drawn from those of its training rows.
            **options: `filters`, `refresh_every`, `guidance` and `compile`, see `SamplingOptions`.

        Returns:
            [num_samples, L] ids, BOS included; of a model of padded rows with an end of text and padding.

        Raises:
            ConfigError: a value outside its bounds, an unknown order, more steps than positions, a given position
                outside the row, a given token that the model cannot draw, or guidance without labels.
            CapabilityError: labels or an order that the model cannot use.
        """
        arguments.integer("num_samples", num_samples, 1)
        tokens = known_tokens(known, num_samples, self.denoiser.length)
        if steps is None:
            unknown = self.denoiser.length - int(self.bos is not None)
            if tokens is not None:  # positions to draw in the row that has the most
                unknown = max(1, int((~tokens[1][:, -unknown:].bool()).sum(1).max()))
            steps = unknown if self.denoiser.left_to_right else min(64, unknown)
        request = SamplingRequest(
            num_samples,
            steps,
            seed,
            order=self._order if order is None else order,
            bos=self.bos,
            condition=self._labels(condition),
            known=tokens,
            **options,
        )
        return sample_rows(self.denoiser, request, self.ends, length, progress)

    def write(
        self,
        prompt: str = "",
        num_samples: int = 1,
        length: int | None = None,
        stride: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        order: str | Order | None = None,
        filters: Filters = Filters(),
    ) -> list[str]:
        """Continue a prompt to `length` tokens or to the end of the text, also beyond L.

        Args:
            prompt: beginning of every text.
            num_samples: number of texts.
            length: tokens, BOS and prompt included; None: L. A model of padded rows ends its texts within L.
            stride: new tokens of every window after the first; None: half of L.
            steps: forward passes of a full window; None: 64, or one for each token of an autoregressive model.
            seed: text i depends on (seed, i) only.
            order: as in `sample`.
            filters: temperature, top-k and nucleus.

        Returns:
            The texts, with the prompt.

        Raises:
            ConfigError: a prompt longer than a row or than `length`, a stride that leaves no context, or a value
                outside its bounds.
            CapabilityError: the model is not one of text.
        """
        tokenizer, window = self._text_tokenizer, self.denoiser.length
        given = prompted(prompt, tokenizer, window, self.bos)
        least = window - given.unknown + 1
        length = window if length is None else arguments.integer("length", length, least, 10**9)
        stride = window // 2 if stride is None else arguments.integer("stride", stride, 1)
        if steps is None:
            steps = window if self.denoiser.left_to_right else 64
        arguments.integer("num_samples", num_samples, 1)
        request = SamplingRequest(
            num_samples,
            min(arguments.integer("steps", steps, 1), given.unknown),
            seed,
            order=self._order if order is None else order,
            bos=self.bos,
            known=known_tokens(given.known, num_samples, window),
            filters=filters,
        )
        if self.ends is not None:
            return self.decode(sample_rows(self.denoiser, request, self.ends)[:, :length])
        rows = sample_long(
            self.denoiser, request, length=max(window, length), stride=stride, stop=tokenizer.eot
        )
        return self.decode(rows[:, :length])

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
        """
        if not isinstance(self.tokenizer, ImageTokenizer) or self.denoiser.left_to_right:
            raise CapabilityError("inpaint: expected a pgm or mdlm of images, with its tokenizer")
        content = image if isinstance(image, np.ndarray) else read_file("image", str(image))
        hidden = mask if isinstance(mask, np.ndarray) else read_file("mask", str(mask))
        given = painted(content, hidden, self.tokenizer, self.denoiser.length, self.bos)
        return self.images(self.sample(num_samples, known=given.known, **options))

    def score(self, pairs: Sequence[tuple[str, str]], draws: int = 32, seed: int = 0) -> list[Continuation]:
        """Bound -log p(continuation | prompt) of texts in nats; exact for an autoregressive model.

        Args:
            pairs: (prompt, continuation).
            draws: random draws that a bound averages over.
            seed: of the draws.

        Returns:
            The bound of every continuation, with its standard error.

        Raises:
            ConfigError: an empty continuation, a pair longer than a row, or a value outside its bounds.
            CapabilityError: the model is not one of text.
        """
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"pairs: {pair!r}; expected a prompt and a continuation")
        arguments.integer("draws", draws, 1, 10**6)
        arguments.integer("seed", seed, 0)
        texts = [arguments.text("pairs", text) for pair in pairs for text in pair]
        ids = self._text_tokenizer.encode_batch(texts)
        rows = [list(map(int, row)) for row in ids]
        tokens = list(zip(rows[::2], rows[1::2], strict=True))
        return score_continuations(self.denoiser, tokens, draws=draws, seed=seed, bos=self.bos)

    def decode(self, tokens: Int[Tensor, "B L"]) -> list[str]:
        """Decode rows of ids to texts.

        Args:
            tokens: ids, BOS included.

        Returns:
            One text a row, without BOS and end-of-text.

        Raises:
            CapabilityError: the model is not one of text.
            ConfigError: no rows, or an id outside the tokenizer's vocabulary.
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
            ConfigError, DataError: no rows of codes.
        """
        if not isinstance(self.tokenizer, ImageTokenizer):
            raise CapabilityError("images: this model has no image tokenizer; expected one of image data")
        codes = arguments.integers("tokens", tokens, "B", "L")[:, int(self.bos is not None) :]
        return self.tokenizer.decode(codes.cpu().numpy())

    def _labels(self, condition: Labels) -> Int[Tensor, "B"] | None:
        """Class labels as a tensor; a list may name them."""
        if isinstance(condition, list | tuple) and any(isinstance(label, str) for label in condition):
            condition = class_ids(condition, self.class_names, "condition")
        return None if condition is None else arguments.integers("condition", condition, "B")

    @property
    def _text_tokenizer(self) -> Tokenizer:
        """The tokenizer, which must be one of text."""
        if not isinstance(self.tokenizer, Tokenizer):
            raise CapabilityError(
                "text: this model has no text tokenizer; `images` decodes the tokens of image models"
            )
        return self.tokenizer


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    overrides: Sequence[str] = (),
    precision: Precision = "fp32",
) -> Model:
    """Load a model folder, a file of released weights, a registered model, or a model of the Hugging Face hub.

    `hf:OWNER/NAME/PATH` and `hf:OWNER/NAME@REVISION/PATH` are a file or folder of a repository, which is downloaded
    into the cache of huggingface_hub; without PATH the repository is the folder. Registered models
    (`models:/NAME@ALIAS`, `models:/NAME/VERSION`) are looked up in MLFLOW_TRACKING_URI, else in the tracking store of
    runs with default settings. Files (.ckpt, .pth, .pt, .bin, .safetensors) are those of the authors' repositories;
    their averaged (EMA) weights are used, and no code in them is run.

    Args:
        path: path or name of the model.
        device: where the model computes.
        overrides: for files, `key=value` settings that replace what the file implies: model.*, length, bos, eot,
            tokenizer.
        precision: of weights and blocks; fast attention on GPUs requires "bf16". Logits are float32.

    Returns:
        The model in eval mode, with its tokenizer if it has one.

    Raises:
        CheckpointError: no such folder, file, model or version, or a damaged one.
        CapabilityError: weights of a model that this project does not have, or a device that this machine does not.
        ConfigError: a wrong override, an override of what is no file, or an unknown precision.
    """
    if precision not in list(DTYPES):
        raise ConfigError(f"precision: {precision!r}; expected fp32 or bf16{did_you_mean(precision, DTYPES)}")
    arguments.instance("path", path, str, Path)
    arguments.instance("overrides", overrides, list, tuple)
    place = arguments.device(device)
    local, _ = trained.find(str(path), tracking.tracking_uri(RunConfig(name="any")))
    opened = trained.read(local, overrides)
    facts = opened.facts
    model = Model(opened.denoiser, facts.bos, opened.tokenizer, facts.class_names, RowEnds.of(facts))
    model.denoiser.to(place, DTYPES[precision])
    return model
