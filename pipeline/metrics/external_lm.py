"""Generative perplexity: the score of texts under a pretrained causal language model."""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch.nn.utils.rnn import pad_sequence

from pipeline import storage
from pipeline.data.tokenizers import END_OF_TEXT
from pipeline.errors import CapabilityError, ConfigError, DataError, did_you_mean
from pipeline.runtime.actors import Resources, in_order, own_device, started

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GGUF, GGUF_READERS = ".gguf", ("gguf", "accelerate")
_TEXTS_PER_TASK = 64
_MAX_LOGITS = 1 << 28  # of one forward pass, 1 GiB in float32


@dataclass(frozen=True)
class Scored:
    """Sums over scored texts.

    Attributes:
        nats: minus the log-probability of all scored tokens.
        tokens: number of scored tokens: all but the first of every text, which has no context.
        cut: tokens beyond the scorer's context, left out.
        features: the scorer's last hidden state at the end of every scored text.
    """

    nats: float
    tokens: int
    cut: int
    features: Float[np.ndarray, "n H"]

    @property
    def perplexity(self) -> float:
        """Return exp(nats per token)."""
        return math.exp(min(self.nats / self.tokens, 700.0))


@dataclass(frozen=True)
class ScorerTokenizer:
    """A scorer's tokenizer and context length.

    Attributes:
        spec: the scorer's name in the config.
        tokenizer: from transformers.
        context: the longest text that the scorer reads, in tokens; None: unlimited.
    """

    spec: str
    tokenizer: "PreTrainedTokenizerBase"
    context: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts; the pipeline's end-of-text marks become the scorer's own.

        Args:
            texts: to encode.
        """
        end = self.tokenizer.eos_token or ""
        texts = [text.replace(END_OF_TEXT, end) for text in texts]
        return self.tokenizer(texts, verbose=False)["input_ids"] if texts else []

    def check_context(self, texts: Sequence[str]) -> None:
        """Refuse a scorer whose context is shorter than the texts.

        Args:
            texts: as long as those that will be scored.

        Raises:
            ConfigError: names the length of the texts and a context that suffices.
        """
        longest = max(map(len, self.encode(texts)), default=0)
        if self.context is not None and longest > self.context:
            raise ConfigError(
                f"evaluation.scorer: {self.spec!r} reads {self.context} tokens, but texts of a row's length have "
                f"up to {longest} of its tokens; expected a scorer with a longer context, such as one of "
                f"{1 << (longest - 1).bit_length()} tokens"
            )


def load_scorer_tokenizer(spec: str) -> ScorerTokenizer:
    """Load a scorer's tokenizer and config, without its weights.

    Args:
        spec: hub name, folder, or a `.gguf` file in either.

    Raises:
        ConfigError: there is no such model.
        CapabilityError: a package that reads it is missing.
    """
    from transformers import AutoConfig, AutoTokenizer  # takes seconds

    config, tokenizer = (_pretrained(kind, spec, {}) for kind in (AutoConfig, AutoTokenizer))
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return ScorerTokenizer(spec, tokenizer, context)


class Scorer:
    """A causal language model in float32; one Ray actor holds one.

    Args:
        spec: as in `load_scorer_tokenizer`.
        batch: texts of a forward pass, at most; fewer where their logits would take too much memory.
        threads: CPU threads.
    """

    def __init__(self, spec: str, batch: int, threads: int):
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(threads)
        self._tokenizer, self._device, self._batch = load_scorer_tokenizer(spec), own_device(), batch
        model = _pretrained(AutoModelForCausalLM, spec, {"dtype": torch.float32})
        self._model = model.to(self._device).eval()

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> Scored:
        """Score texts. Padding stands behind the texts, where a causal model does not see it.

        Args:
            texts: to score; those without two tokens are left out.
        """
        ids = self._tokenizer.encode(texts)
        kept = [text[: self._tokenizer.context] for text in ids]
        cut = sum(map(len, ids)) - sum(map(len, kept))
        kept = sorted((text for text in kept if len(text) > 1), key=len)
        embedding = self._model.get_input_embeddings()
        nats, first = 0.0, 0
        features = [np.empty((0, embedding.embedding_dim), np.float32)]
        while first < len(kept):
            longest = len(kept[min(first + self._batch, len(kept)) - 1])
            count = max(1, min(self._batch, _MAX_LOGITS // (embedding.num_embeddings * longest)))
            batch_nats, batch_features = self._score_batch(kept[first : first + count])
            nats += batch_nats
            features.append(batch_features)
            first += count
        return Scored(nats, sum(len(text) - 1 for text in kept), cut, np.concatenate(features))

    def _score_batch(self, texts: list[list[int]]) -> tuple[float, Float[np.ndarray, "n H"]]:
        """Return the nats of all texts and the hidden state at the end of each."""
        rows = [torch.tensor(text, device=self._device) for text in texts]
        tokens = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        out = self._model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        features = out.hidden_states[-1][torch.arange(len(rows), device=self._device), mask.sum(1) - 1]
        nats = sum(
            float(F.cross_entropy(logits[: len(row) - 1].float(), row[1:], reduction="sum"))
            for logits, row in zip(out.logits, rows, strict=True)
        )
        return nats, features.float().cpu().numpy()


def score_texts(spec: str, groups: Sequence[Sequence[str]], batch: int, resources: Resources) -> list[Scored]:
    """Score groups of texts on Ray actors; the sums do not depend on the number of actors.

    Args:
        spec: the scorer, as in `load_scorer_tokenizer`.
        groups: texts whose sums are kept apart.
        batch: texts of a forward pass, at most.
        resources: of the actors, each of which holds the scorer.

    Raises:
        DataError: no text of a group has a token to score.
    """
    tasks = [
        (list(texts[first : first + _TEXTS_PER_TASK]),)
        for texts in groups
        for first in range(0, len(texts), _TEXTS_PER_TASK)
    ]
    with started(Scorer, (spec, batch, resources.cpus), resources, len(tasks)) as scorers:
        parts = in_order(scorers, "score", tasks)
        return [total(islice(parts, -(-len(texts) // _TEXTS_PER_TASK))) for texts in groups]


def total(parts: Iterable[Scored]) -> Scored:
    """Add sums up.

    Args:
        parts: sums of parts of the texts.

    Raises:
        DataError: no text has a token to score.
    """
    parts = list(parts)
    tokens = sum(part.tokens for part in parts)
    if not tokens:
        raise DataError("generative perplexity: no text of at least two tokens; expected samples")
    features = np.concatenate([part.features for part in parts])
    return Scored(math.fsum(part.nats for part in parts), tokens, sum(part.cut for part in parts), features)


def _pretrained(kind: Any, spec: str, settings: dict[str, Any]) -> Any:
    """Call `kind.from_pretrained` for a scorer and turn its failures into errors that name the config key."""
    source, file, key = spec, None, f"evaluation.scorer: {spec!r}"
    if spec.endswith(GGUF):
        source, _, file = spec.rpartition("/")
        missing = [package for package in GGUF_READERS if find_spec(package) is None]
        if missing:
            raise CapabilityError(f"{key} needs packages that are not installed: {', '.join(missing)}")
    local = storage.resolve(source)
    try:
        source = str(storage.fetch(local)) if storage.exists(local) else source
        return kind.from_pretrained(source, **settings, **({"gguf_file": file} if file else {}))
    except ImportError as error:
        raise CapabilityError(f"{key} needs a package that is not installed: {_first_line(error)}") from None
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        path = storage.resolve(spec)
        folder, _, name = path.rpartition("/")
        near = "" if storage.exists(path) else did_you_mean(name, storage.listing(folder))
        raise ConfigError(
            f"{key} cannot be loaded: {_first_line(error)}; expected the hub name or folder of a causal language "
            f"model, or a {GGUF} file{near}"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
