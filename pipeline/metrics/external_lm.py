"""Generative perplexity: what a causal language model of others thinks of texts."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from pipeline import storage
from pipeline.data.tokenizers import END_OF_TEXT
from pipeline.errors import CapabilityError, ConfigError, DataError, did_you_mean
from pipeline.runtime.actors import Resources, in_order, own_device, started

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GGUF, GGUF_READERS = ".gguf", ("gguf", "accelerate")
_TEXTS_A_TASK = 64
_LOGITS = 1 << 28  # of one forward pass, 1 GiB in float32


@dataclass(frozen=True)
class Scored:
    """Sums over texts.

    Attributes:
        nats: minus log-probability of all scored tokens.
        tokens: that were scored: of every text all but the first, which nothing precedes.
        cut: tokens beyond the scorer's context, left out.
        features: the scorer's last hidden state at the end of every scored text.
    """

    nats: float
    tokens: int
    cut: int
    features: Float[np.ndarray, "n H"]

    @property
    def perplexity(self) -> float:
        """exp of the nats of a token."""
        return math.exp(min(self.nats / self.tokens, 700.0))


@dataclass(frozen=True)
class ScorerTokenizer:
    """A scorer's tokenizer and the longest text that the scorer reads (None: any).

    Attributes:
        spec: the scorer's name in the config.
    """

    spec: str
    tokenizer: "PreTrainedTokenizerBase"
    context: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text; its ends of text become the scorer's own."""
        end = self.tokenizer.eos_token or ""
        told = [text.replace(END_OF_TEXT, end) for text in texts]
        return self.tokenizer(told, verbose=False)["input_ids"] if told else []

    def check_context(self, texts: Sequence[str]) -> None:
        """Refuse a scorer that cannot read such texts whole.

        Raises:
            ConfigError: says how long the texts are.
        """
        longest = max(map(len, self.encode(texts)), default=0)
        if self.context is not None and longest > self.context:
            raise ConfigError(
                f"evaluation.scorer: {self.spec!r} reads {self.context} tokens, but texts of a row's length have "
                f"up to {longest} of its tokens; expected a scorer with a longer context, such as one of "
                f"{1 << (longest - 1).bit_length()} tokens"
            )


def load_scorer_tokenizer(spec: str) -> ScorerTokenizer:
    """What can be known of a scorer without its weights.

    Args:
        spec: hub name, folder, or a `.gguf` file in either.

    Raises:
        ConfigError: there is no such model.
        CapabilityError: a package that reads it is missing.
    """
    from transformers import AutoConfig, AutoTokenizer  # takes seconds

    config = _pretrained(AutoConfig, spec)
    tokenizer = _pretrained(AutoTokenizer, spec)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return ScorerTokenizer(spec, tokenizer, context)


class Scorer:
    """A causal language model in float32, one of the actors.

    Args:
        batch: texts of one forward pass, at most; fewer where all their logits would take too much memory.
        threads: CPU threads.
    """

    def __init__(self, spec: str, batch: int, threads: int):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as noise

        noise.disable_progress_bar()
        torch.set_num_threads(threads)
        self._tokenizer = load_scorer_tokenizer(spec)
        self._device = own_device()
        self._model = _pretrained(AutoModelForCausalLM, spec, dtype=torch.float32).to(self._device).eval()
        self._batch = batch

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> Scored:
        """Sums over the texts; padding is behind them, where a causal model does not see it."""
        ids = self._tokenizer.encode(texts)
        kept = [text[: self._tokenizer.context] for text in ids]
        cut = sum(map(len, ids)) - sum(map(len, kept))
        kept = sorted((text for text in kept if len(text) > 1), key=len)
        embedding = self._model.get_input_embeddings()
        nats, vocabulary, first = 0.0, embedding.num_embeddings, 0
        features = [np.empty((0, embedding.embedding_dim), np.float32)]
        while first < len(kept):
            fits = max(1, _LOGITS // (vocabulary * len(kept[min(first + self._batch, len(kept)) - 1])))
            part = kept[first : first + min(self._batch, fits)]
            found, seen = self._judge(part)
            nats += found
            features.append(seen)
            first += len(part)
        return Scored(nats, sum(len(text) - 1 for text in kept), cut, np.concatenate(features))

    def _judge(self, part: list[list[int]]) -> tuple[float, Float[np.ndarray, "n H"]]:
        """Nats of all texts, and the hidden state at the end of each."""
        width = max(map(len, part))
        tokens = torch.tensor([text + [0] * (width - len(text)) for text in part], device=self._device)
        real = torch.tensor(
            [[1] * len(text) + [0] * (width - len(text)) for text in part], device=self._device
        )
        out = self._model(input_ids=tokens, attention_mask=real, output_hidden_states=True)
        ends = torch.tensor([len(text) - 1 for text in part], device=self._device)
        features = out.hidden_states[-1][torch.arange(len(part), device=self._device), ends]
        nats = sum(
            float(F.cross_entropy(row[: len(text) - 1].float(), ids[1 : len(text)], reduction="sum"))
            for row, ids, text in zip(out.logits, tokens, part, strict=True)  # logits [B, width, V]
        )
        return nats, features.float().cpu().numpy()


def score_texts(spec: str, groups: Sequence[Sequence[str]], batch: int, resources: Resources) -> list[Scored]:
    """Score groups of texts on Ray actors that each hold the scorer; sums do not depend on how many there are.

    Raises:
        DataError: no text of a group has a token to score.
    """
    starts = [(texts, first) for texts in groups for first in range(0, len(texts), _TEXTS_A_TASK)]
    tasks = [(list(texts[first : first + _TEXTS_A_TASK]),) for texts, first in starts]
    with started(Scorer, (spec, batch, resources.cpus), resources, len(tasks)) as scorers:
        parts = in_order(scorers, "score", tasks)
        return [total(islice(parts, -(-len(texts) // _TEXTS_A_TASK))) for texts in groups]


def total(parts: Any) -> Scored:
    """Sums of sums.

    Raises:
        DataError: no text has a token to score.
    """
    found = list(parts)
    tokens = sum(part.tokens for part in found)
    if not tokens:
        raise DataError("generative perplexity: no text of at least two tokens; expected samples")
    features = np.concatenate([part.features for part in found])
    cut = sum(part.cut for part in found)
    return Scored(math.fsum(part.nats for part in found), tokens, cut, features)


def _pretrained(kind: Any, spec: str, **settings: Any) -> Any:
    """`kind.from_pretrained` of a scorer, its failures told as what they are."""
    place, name = spec, None
    if spec.endswith(GGUF):
        place, _, name = spec.rpartition("/")
        missing = [package for package in GGUF_READERS if find_spec(package) is None]
        if missing:
            raise CapabilityError(
                f"evaluation.scorer: {spec!r} needs packages that are not installed: {', '.join(missing)}"
            )
    local = storage.resolve(place)
    try:
        if storage.exists(local):
            place = str(storage.fetch(local))
        if name is not None:
            settings["gguf_file"] = name
        return kind.from_pretrained(place, **settings)
    except ImportError as error:
        raise CapabilityError(
            f"evaluation.scorer: {spec!r} needs a package that is not installed: {_line(error)}"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        folder, _, last = storage.resolve(spec).rpartition("/")
        near = (
            did_you_mean(last, storage.listing(folder)) if not storage.exists(storage.resolve(spec)) else ""
        )
        raise ConfigError(
            f"evaluation.scorer: {spec!r} cannot be loaded: {_line(error)}; expected a causal language model's hub "
            f"name, its folder, or a {GGUF} file{near}"
        ) from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
