"""The model object that users hold: logits, predictions, samples."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from pipeline import storage, tracking
from pipeline.config.load import parse_section
from pipeline.config.schema import CardConfig, ImportConfig, ModelConfig, Precision, RunConfig
from pipeline.data.tokenizers import Tokenizer, load_tokenizer, saved_tokenizer
from pipeline.errors import CapabilityError, CheckpointError, ConfigError, did_you_mean
from pipeline.metrics.continuations import Continuation, score_continuations
from pipeline.models import model_folder
from pipeline.models.denoiser import DTYPES, Denoiser, flat_index
from pipeline.models.model_card import card
from pipeline.models.released import conversion
from pipeline.models.vq import ImageTokenizer
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from pipeline.sampling.sampler import ragged_known, sample, sample_long

Known = dict[int, int] | list[dict[int, int]] | tuple[Tensor, Tensor]

log = logging.getLogger(__name__)


class Model:
    """A trained model with its tokenizer.

    Attributes:
        denoiser: the network, in eval mode.
        bos: id that stands known at position 0 of every row, or None.
        tokenizer: turns rows into text or images, or None for data without one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        bos: int | None = None,
        tokenizer: Tokenizer | ImageTokenizer | None = None,
    ):
        self.denoiser = denoiser.eval()
        self.bos, self.tokenizer = bos, tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.denoiser.head.weight.device

    def to(self, device: torch.device | str) -> "Model":
        """Move the model; inputs may stay where they are."""
        self.denoiser.to(device)
        return self

    @torch.inference_mode()
    def logits(
        self,
        tokens: Int[Tensor, "B L"],
        groups: Int[Tensor, "B L"] | Bool[Tensor, "B L"],
        condition: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Logits at every position from the tokens of the other group (masked models: two passes).

        Autoregressive models know no groups and refuse; `predict` asks them for the next token.

        Shape:
            tokens: [B, L] ids below V; groups: [B, L] of 0 and 1; returns [B, L, V] float32. L includes BOS
            where the data has one.

        Source: arXiv 2505.18883, section 4.
        """
        return self.denoiser.logits(tokens.to(self.device), groups.to(self.device).bool(), condition)

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
        """Logits at the asked positions from known tokens alone.

        Shape:
            known, positions: [B, K] ids and where they stand, the first `lengths[b]` of row b valid (0
            allowed); queries: [B, Q] positions, the first `query_lengths[b]` valid (None: all of them).
            Returns [B, Q, V] float32, zero beyond the valid queries.

        Raises:
            ConfigError: a position outside the row, or a length beyond the padded width.
        """
        self._check_positions("positions", positions, lengths)
        self._check_positions("queries", queries, query_lengths)
        rows, width = queries.shape
        counts = [int(n) for n in lengths]
        asked = [width] * rows if query_lengths is None else [int(n) for n in query_lengths]
        here = flat_index(counts, [0] * rows, known.shape[1])
        there = flat_index(asked, [0] * rows, width)
        state = self.denoiser.open(rows, condition)  # L entries a row: what is padded beyond them is not kept
        self.denoiser.extend(
            state,
            known.cpu().flatten()[here].to(self.device),
            positions.cpu().flatten()[here].to(self.device),
            counts,
        )
        hidden = self.denoiser.hidden(state, queries.cpu().flatten()[there].to(self.device), asked)
        logits = self.denoiser.head(hidden)
        out = logits.new_zeros(rows * width, self.denoiser.vocab_size)
        out[there.to(self.device)] = logits
        return out.view(rows, width, self.denoiser.vocab_size)

    def _check_positions(self, name: str, positions: Tensor, lengths: Tensor | None) -> None:
        rows, width = positions.shape
        counts = torch.full((rows,), width) if lengths is None else lengths.cpu()
        if counts.shape != (rows,) or (counts < 0).any() or (counts > width).any():
            raise ConfigError(
                f"{name}: lengths {counts.tolist()[:8]}; expected one of 0 to {width} for each of {rows} rows"
            )
        valid = positions.cpu()[torch.arange(width) < counts[:, None]]
        if ((valid < 0) | (valid >= self.denoiser.length)).any():
            worst = int(valid.min()) if (valid < 0).any() else int(valid.max())
            raise ConfigError(f"{name}: {worst}; expected 0 to {self.denoiser.length - 1}")

    def sample(
        self,
        num_samples: int = 4,
        steps: int | None = None,
        order: str | Order | None = None,
        seed: int = 0,
        condition: Int[Tensor, "B"] | None = None,
        progress: Callable[[int, int], None] | None = None,
        known: Known | None = None,
        filters: Filters = Filters(),
        refresh_every: int = 1,
        guidance: float = 0.0,
    ) -> Int[Tensor, "B L"]:
        """Draw rows of tokens in `steps` forward passes; [num_samples, L], BOS included.

        Args:
            steps: None: 64, or as many as there are positions if those are fewer or the order is left to right.
            order: a name, or an `Order` with its settings; None: "uniform", or "left_to_right" for an
                autoregressive model.
            known: given tokens: `{position: token}` for all samples, a list of such, or (tokens, mask), [B, L]
                each. They are kept as they are and everything else is drawn around them.
            filters: temperature, top-k, nucleus.
            refresh_every: PGM: steps between full encodings of the known tokens; 1 is exact.
            condition: class labels, [num_samples]; None: without class.
            guidance: w of classifier-free guidance at the last step, reached linearly from 0; needs `condition`.

        Raises:
            ConfigError: unknown order, more steps than positions, a given position outside the row.
        """
        given = self._given(known, num_samples)
        order = order or self._default_order
        if steps is None:
            unknown = self._unknown(given)
            steps = unknown if self.denoiser.left_to_right else min(64, unknown)
        return sample(
            self.denoiser,
            num_samples,
            steps,
            seed,
            order,
            self.bos,
            condition,
            progress=progress,
            filters=filters,
            known=given,
            refresh_every=refresh_every,
            guidance=guidance,
        )

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
            length: tokens, the prompt included; None: L.
            stride: new tokens of every window after the first; None: half of L.

        Raises:
            ConfigError: a prompt longer than a row, a stride that leaves no context.
        """
        tokenizer = self._text_tokenizer
        window, start = self.denoiser.length, int(self.bos is not None)
        ids = tokenizer.encode_batch([prompt])[0]
        most = window - start - 1
        if len(ids) > most:
            raise ConfigError(f"prompt: {len(ids)} tokens; expected at most {most} for rows of {window}")
        rows = sample_long(
            self.denoiser,
            num_samples,
            max(window, length or window),
            stride or window // 2,
            min(steps or (window if self.denoiser.left_to_right else 64), window - start - len(ids)),
            seed,
            order or self._default_order,
            self.bos,
            filters=filters,
            known=self._given({start + i: int(token) for i, token in enumerate(ids)}, num_samples),
            stop=tokenizer.eot,
        )
        return self.decode(rows[:, : length or window])

    @property
    def _default_order(self) -> str:
        return "left_to_right" if self.denoiser.left_to_right else "uniform"

    def _unknown(self, given: tuple[Tensor, Tensor] | None) -> int:
        """Positions to draw in the row that has the most."""
        start = int(self.bos is not None)
        if given is None:
            return self.denoiser.length - start
        return max(1, int((~given[1][:, start:].bool()).sum(1).max()))

    def _given(self, known: Known | None, rows: int) -> tuple[Tensor, Tensor] | None:
        if known is None or isinstance(known, tuple):
            return known
        prompts = [known] * rows if isinstance(known, dict) else known
        if len(prompts) != rows:
            raise ConfigError(f"known: {len(prompts)} prompts for {rows} samples")
        return ragged_known(prompts, self.denoiser.length)

    def score(self, pairs: Sequence[tuple[str, str]], draws: int = 32, seed: int = 0) -> list[Continuation]:
        """Bounds on -log p(continuation | prompt) in nats for (prompt, continuation) texts; exact for AR.

        Raises:
            ConfigError: an empty continuation, or a pair longer than a row.
        """
        ids = self._text_tokenizer.encode_batch([text for pair in pairs for text in pair])
        rows = [list(map(int, row)) for row in ids]
        return score_continuations(
            self.denoiser, list(zip(rows[::2], rows[1::2], strict=True)), draws, seed, self.bos
        )

    def decode(self, tokens: Int[Tensor, "B L"]) -> list[str]:
        """Rows of ids as texts; BOS and end-of-text are not shown."""
        tokenizer = self._text_tokenizer
        special = {self.bos, tokenizer.eot}
        return [tokenizer.decode([i for i in row if i not in special]) for row in tokens.tolist()]

    def images(self, tokens: Int[Tensor, "B L"]) -> UInt8[np.ndarray, "B S S 3"]:
        """Rows of codes, BOS included, as RGB images.

        Raises:
            CapabilityError: the model is not one of images, or came without its tokenizer.
        """
        if not isinstance(self.tokenizer, ImageTokenizer):
            raise CapabilityError("images: this model has no image tokenizer; expected one of image data")
        return self.tokenizer.decode(tokens[:, int(self.bos is not None) :].cpu().numpy())

    @property
    def _text_tokenizer(self) -> Tokenizer:
        if not isinstance(self.tokenizer, Tokenizer):
            raise CapabilityError(
                "text: this model has no text tokenizer; `images` decodes those of image data"
            )
        return self.tokenizer


@dataclass(frozen=True)
class _Source:
    """A model as it was found, with all that an export passes on."""

    denoiser: Denoiser
    config: ModelConfig
    facts: model_folder.DataFacts
    tokenizer: Tokenizer | ImageTokenizer | None
    background: model_folder.Background


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    overrides: Sequence[str] = (),
    precision: Precision = "fp32",
) -> Model:
    """Load a model folder, a file of released weights, or a registered model.

    Registered models (`models:/NAME@ALIAS`, `models:/NAME/VERSION`) are looked up in MLFLOW_TRACKING_URI, else
    in the store of runs with default settings. Files (.ckpt, .pth, .pt, .bin, .safetensors) are those of the
    authors' repositories; their averaged (EMA) weights are used, and nothing that they name is run.

    Args:
        overrides: for files, `key=value` words over what the file says: model.*, length, bos, eot, tokenizer.
        precision: of weights and blocks: "bf16" is what fast attention on GPUs needs. Logits are float32.

    Raises:
        CheckpointError: no such folder, file, model or version, or its content does not fit together.
        CapabilityError: weights of a model that this project does not have.
        ConfigError: an override is wrong, or is given for what is no file; no such precision.
    """
    if precision not in DTYPES:
        raise ConfigError(f"precision: {precision!r}; expected fp32 or bf16{did_you_mean(precision, DTYPES)}")
    source = _open(str(path), overrides)
    denoiser = source.denoiser.to(device, DTYPES[precision])
    return Model(denoiser, source.facts.bos, source.tokenizer)


def export_model(source: str | Path, destination: str, words: Sequence[str] = ()) -> None:
    """Write a model folder with configs, tokenizer and a card, ready for the Hugging Face hub.

    Args:
        source: whatever `load_model` takes.
        destination: folder or URL; complete or absent. An earlier model there is replaced.
        words: `license=NAME` and `figures.NAME=VALUE` for the card, and the overrides of `load_model`.

    Raises:
        ConfigError: a word is wrong, or the destination holds something that is no model.
    """
    there = storage.listing(destination)
    if there and not {model_folder.WEIGHTS, model_folder.CONFIG} <= set(there):
        raise ConfigError(
            f"destination {destination!r} holds {', '.join(there[:5])}; expected a new folder or a model's"
        )
    keys = {word: word.partition("=")[0].partition(".")[0] for word in words}
    known = [*CardConfig.model_fields, *ImportConfig.model_fields]
    for word, key in keys.items():
        if key not in known:
            raise ConfigError(f"{word!r}: no such key{did_you_mean(key, known)}; known: {', '.join(known)}")
    for_card = [word for word in words if keys[word] in CardConfig.model_fields]
    settings = parse_section(CardConfig, {}, "export", for_card)
    opened = _open(str(source), [word for word in words if word not in for_card])
    figures = {**opened.background.figures, **settings.figures}
    tensors = opened.denoiser.state_dict()
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary) / "model"
        # Where a run kept its files and logs is nobody's affair on a hub.
        run = {k: v for k, v in opened.background.run.items() if k not in ("cluster", "tracking")}
        background = model_folder.Background(figures, run)
        model_folder.write(local, opened.config, opened.facts, tensors, background)
        text = card(
            Path(destination).name,
            opened.config,
            opened.facts,
            sum(value.numel() for value in tensors.values()),
            figures,
            settings.license,
            Path(source).name,
        )
        (local / "README.md").write_text(text, encoding="utf-8")
        if opened.tokenizer is not None:
            opened.tokenizer.save(local)
        storage.publish_folder(local, destination)


def _open(path: str, overrides: Sequence[str]) -> _Source:
    """Find and read a model of any kind."""
    if path.startswith("models:/"):
        local = tracking.download_model(tracking.tracking_uri(RunConfig(name="any")), path)
    elif not storage.exists(path):
        raise CheckpointError(f"model {path!r}: no such folder or file")
    else:
        local = storage.fetch(path)
    if local.name == model_folder.WEIGHTS and (local.parent / model_folder.CONFIG).is_file():
        local = local.parent  # the weights file of a model folder
    if local.is_file():
        denoiser, config, facts = conversion.load(local, overrides)
        chosen = any(word.startswith("tokenizer=") for word in overrides)
        tokenizer = _tokenizer(config.tokenizer, facts.vocab_size, chosen)
        return _Source(denoiser, config.model, facts, tokenizer, model_folder.Background())
    if overrides:
        raise ConfigError(
            f"override {overrides[0]!r}: {path}: overrides apply only to released weight files; the config.yaml "
            "of a model folder fixes the architecture"
        )
    denoiser, model, facts = model_folder.read(local)
    return _Source(denoiser, model, facts, saved_tokenizer(local), model_folder.read_background(local))


def _tokenizer(name: str | None, vocabulary: int, chosen: bool) -> Tokenizer | None:
    """The tokenizer of released weights; what was not asked for may be missing on this machine."""
    if name is None:
        return None
    try:
        tokenizer = load_tokenizer(name)
    except ConfigError as error:
        if chosen:
            raise
        log.warning("the model comes without a tokenizer: %s", error)
        return None
    if tokenizer.vocab_size != vocabulary:
        raise ConfigError(
            f"tokenizer: {name!r} has {tokenizer.vocab_size} ids; expected the model's {vocabulary}"
        )
    return tokenizer
