"""A trained model as an object: logits, predictions, and rows of sampled tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict, Unpack, cast

import numpy as np
import torch
import yaml
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline import arguments, storage
from pipeline.config.model import ModelConfig
from pipeline.data.tokenizers import PairTokenizer, Tokenizer
from pipeline.errors import ConfigError
from pipeline.logs import progress_bar
from pipeline.metrics.class_names import class_ids
from pipeline.models.denoiser import DTYPES, Denoiser
from pipeline.models.vq import ImageTokenizer
from pipeline.reports.tables import aligned, table_of
from pipeline.reports.view import ROWS, Revealed, names_of
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from pipeline.sampling.row_ends import RowEnds, cut_rows, sample_rows
from pipeline.sampling.sampler import MOST_SAMPLES, Known, SamplingRequest, known_tokens

Labels = Int[Tensor, "B"] | Sequence[int | str] | None
Progress = bool | Callable[[int, int], None]  # a bar, or a function of (steps done, steps)


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


class ViewOptions(SamplingOptions, total=False):
    """Further keyword arguments of `Model.sample` alone.

    Attributes:
        view: HTML file to write, by path or URL, which shows step by step how the first 80 rows were revealed.
    """

    view: str | Path


class TokenModel:
    """A trained model of rows of tokens.

    Args:
        denoiser: the network, which is put into eval mode.
        bos: id that stands known at position 0 of every row, or None.
        tokenizer: converts rows to text, images, or both; None for data without one.
        class_names: by label; None: the classes have no names.
        ends: how rows end that have padding; None: rows have none.

    Attributes:
        denoiser, bos, tokenizer, class_names, ends: as given.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        bos: int | None = None,
        tokenizer: Tokenizer | ImageTokenizer | PairTokenizer | None = None,
        class_names: Sequence[str] | None = None,
        ends: RowEnds | None = None,
    ):
        self.denoiser = denoiser.eval()
        self.bos, self.tokenizer, self.class_names, self.ends = bos, tokenizer, class_names, ends
        self._order = "left_to_right" if denoiser.left_to_right else "uniform"
        modalities = denoiser.head.modalities
        if modalities is not None and not denoiser.left_to_right:
            self._order = "halton"  # of the image; the caption's is uniform

    @property
    def answer_ends(self) -> RowEnds | None:
        """How answers end, for a model that was trained on prompts and answers; None for others."""
        return self.ends if self.ends is not None and self.ends.block is not None else None

    @property
    def config(self) -> ModelConfig:
        """The model section of the config that the model was built from."""
        return cast(ModelConfig, self.denoiser.config)

    @property
    def length(self) -> int:
        """L, tokens of a row, BOS included."""
        return self.denoiser.length

    @property
    def vocab_size(self) -> int:
        """V, number of ids that the model can predict."""
        return self.denoiser.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.denoiser.head.weight.device

    def __repr__(self) -> str:
        """Describe the model in one line."""
        weight, classes = self.denoiser.head.weight, self.config.classes
        precision = next((name for name, dtype in DTYPES.items() if dtype == weight.dtype), weight.dtype)
        words = [
            self.config.kind,
            f"{sum(x.numel() for x in self.denoiser.parameters()):,} parameters",
            f"L={self.length}",
            f"V={self.vocab_size}",
            *([] if classes is None else [f"{classes} classes"]),
            "no tokenizer" if self.tokenizer is None else f"tokenizer {self.tokenizer.name}",
            f"{weight.device}",
            f"{precision}",
        ]
        return f"{type(self).__name__}({', '.join(words)})"

    def summary(self) -> None:
        """Print the model in one line, a table of its parts, and its config.

        Examples:
            >>> load_model("runs/quickstart/model").summary()  # doctest: +ELLIPSIS
            Model(pgm, 1,123,328 parameters, L=64, V=1024, tokenizer bpe:1024, cpu, fp32)
            <BLANKLINE>
              part       blocks  parameters
              embedding             131,072
              encoder         2     396,544
              swap                   66,432
              decoder         2     396,800
              final                     384
              head                  132,096
            <BLANKLINE>
            hidden: 128
            ...
        """
        ends = ("final", "head")  # the last parts of all models, which they build first
        parts = sorted(self.denoiser.named_children(), key=lambda part: part[0] in ends)
        rows = [
            {
                "part": name,
                "blocks": str(len(part)) if isinstance(part, torch.nn.ModuleList) else "",
                "parameters": f"{count:,}",
            }
            for name, part in parts
            if (count := sum(x.numel() for x in part.parameters()))
        ]
        settings = self.config.model_dump(mode="json", exclude_none=True)
        config = yaml.safe_dump(settings, sort_keys=False).rstrip()
        print(f"{self!r}\n\n{aligned(table_of(rows))}\n\n{config}")  # noqa: T201

    def to(self, device: torch.device | str) -> "TokenModel":
        """Move the model to a device.

        Args:
            device: where to compute; inputs may be on any device.

        Returns:
            The model itself.

        Raises:
            CapabilityError: this machine has no such device.

        Examples:
            >>> load_model("runs/quickstart/model").to("cpu").device
            device(type='cpu')
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

        Examples:
            >>> model = load_model("runs/quickstart/model")
            >>> tokens = model.sample(num_samples=2, steps=8)
            >>> groups = torch.arange(model.length) % 2  # even positions are predicted from the odd ones
            >>> model.logits(tokens, groups.expand(2, -1)).shape
            torch.Size([2, 64, 1024])
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

        Examples:
            >>> model = load_model("runs/quickstart/model")
            >>> known, positions = [[model.bos, 41]], [[0, 5]]
            >>> logits = model.predict(known, positions, lengths=[2], queries=[[4, 6, 7]])
            >>> logits.shape
            torch.Size([1, 3, 1024])
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
        hidden = self.denoiser.hidden(state, targets, query_mask.sum(1).tolist())
        logits = self.denoiser.head(hidden, places=targets)
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
        progress: Progress = False,
        known: Known | None = None,
        length: int | None = None,
        **options: Unpack[ViewOptions],
    ) -> Int[Tensor, "B L"]:
        """Draw rows of tokens.

        Args:
            num_samples: number of rows.
            steps: number of forward passes; None: 64, or the number of positions to draw if that is smaller or the
                model is autoregressive.
            order: a name, or an `Order` with its settings; None: "uniform", "left_to_right" for an autoregressive
                model, "halton" for one of images with captions.
            seed: sample i depends on (seed, i) only.
            condition: class labels, [num_samples], which a list may give by name; None: without class.
            progress: True shows a progress bar; a function is called with (steps done, steps) after every step.
            known: given tokens: `{position: token}` for all samples, a list of one for each, or (tokens, mask), both
                [num_samples, L]. They are kept, and everything else is drawn around them.
            length: tokens of every row, for a model of padded rows; None: drawn from those of its training rows.
            **options: `filters`, `refresh_every`, `guidance` and `compile`, see `SamplingOptions`; and `view`, a file
                for a page that shows step by step how the rows were revealed.

        Returns:
            [num_samples, L] ids, BOS included; of a model of padded rows with an end of text and padding.

        Raises:
            ConfigError: a value outside its bounds, an unknown order, more steps than positions, a given position
                outside the row, a given token that the model cannot draw, or guidance without labels.
            CapabilityError: labels or an order that the model cannot use.

        Examples:
            >>> model = load_model("runs/quickstart/model")
            >>> tokens = model.sample(num_samples=2, steps=16, filters=Filters(top_p=0.9), seed=1)
            >>> tokens.shape
            torch.Size([2, 64])
        """
        arguments.integer("num_samples", num_samples, 1, MOST_SAMPLES)
        view = options.pop("view", None)
        if view is not None:
            arguments.instance("view", view, str, Path)
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
            **cast(SamplingOptions, options),
        )
        bar, shape = progress_bar(progress, "steps"), (num_samples, self.denoiser.length)
        revealed_at = None if view is None else torch.zeros(shape, dtype=torch.int64)
        rows = sample_rows(self.denoiser, request, self.ends, length, bar, revealed_at)
        if view is not None and revealed_at is not None:
            self._write_view(view, request, rows.cpu().numpy(), revealed_at.numpy())
        return rows

    def _write_view(
        self,
        file: str | Path,
        request: SamplingRequest,
        rows: Int[np.ndarray, "B L"],
        revealed_at: Int[np.ndarray, "B L"],
    ) -> None:
        """Write the page of sampled rows."""
        labels = None if request.condition is None else request.condition.tolist()
        order, images, ends, tokenizer = request.order, None, self.ends, self.tokenizer
        names = names_of(labels, self.class_names)
        if isinstance(tokenizer, ImageTokenizer):
            images = tokenizer.decode(rows[:ROWS, int(self.bos is not None) :])
        modalities = self.denoiser.head.modalities
        if isinstance(tokenizer, PairTokenizer):
            assert modalities is not None
            images, names = (
                tokenizer.images(rows[:ROWS], modalities.places),
                tokenizer.captions(rows, modalities.places),
            )
            rows, revealed_at = (x[:, modalities.places :] for x in (rows, revealed_at))
            tokenizer = None  # the codes of images, each under its caption
        shown = cut_rows(rows, ends and ends.eot, ends and ends.pad)
        page = Revealed(shown, revealed_at, request.steps, self.bos, tokenizer, images, names)
        facts = {
            "model": self.config.kind,
            "samples": len(rows),
            "order": order if isinstance(order, str) else order.name,
            "steps": request.steps,
            "seed": request.seed,
        }
        storage.publish_text(str(file), page.to_html(facts))

    def _labels(self, condition: Labels) -> Int[Tensor, "B"] | None:
        """Class labels as a tensor; a list may name them."""
        if isinstance(condition, list | tuple) and any(isinstance(label, str) for label in condition):
            condition = class_ids(condition, self.class_names, "condition")
        return None if condition is None else arguments.integers("condition", condition, "B")
