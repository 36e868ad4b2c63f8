"""Validation during training: the likelihood of held-out rows under the EMA weights, and samples."""

import logging

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int

from pipeline import storage
from pipeline.config.evaluation import SamplingConfig
from pipeline.data.manifest import TOKENIZER
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import PairTokenizer, load_tokenizer
from pipeline.metrics import likelihood
from pipeline.metrics.class_names import class_ids
from pipeline.metrics.draw import draw_rows
from pipeline.models.denoiser import Denoiser
from pipeline.models.vq import ImageTokenizer, load_image_tokenizer
from pipeline.reports.pictures import captioned_grid, sample_grid, unmasking_order
from pipeline.run import Run
from pipeline.runtime.session import Session
from pipeline.sampling.row_ends import texts_of
from pipeline.sampling.sampler import Known
from pipeline.tracking import Tracker
from pipeline.training.ema import EMA
from pipeline.training.engine import Engine

log = logging.getLogger(__name__)

TEXTS, PICTURES_A_CLASS, CLASSES_SHOWN = 2, 4, 10
PAIRS = 16  # held-out captions whose images are shown


def image_tokenizer(run: Run, device: torch.device | str = "cpu", batch: int | None = None) -> ImageTokenizer:
    """Load the tokenizer that made the codes of a run's images; it lies beside the shards.

    Args:
        run: on images, with captions or without.
        device: of the tokenizer.
        batch: number of images per call; None: as many as when the codes were made.

    Returns:
        The tokenizer.
    """
    data = run.config.data
    assert data.kind != "text"
    folder = storage.join(run.data_path, TOKENIZER)
    return load_image_tokenizer(folder, data.factor, batch or data.encode_batch, device)


def pair_tokenizer(run: Run, device: torch.device | str = "cpu") -> PairTokenizer:
    """Load the tokenizers of a run's captions and images.

    Args:
        run: on captions and images.
        device: of the tokenizer of images.
    """
    return PairTokenizer(load_tokenizer(storage.join(run.data_path, TOKENIZER)), image_tokenizer(run, device))


def validation_rows(available: int, most: int) -> Int[np.ndarray, "n"]:
    """Choose at most `most` of the `available` held-out rows, evenly spread.

    Args:
        available: number of held-out rows.
        most: largest number of rows to choose.

    Returns:
        Indices of the rows, ascending.
    """
    return np.unique(np.linspace(0, available - 1, min(most, available)).astype(np.int64))


def validate(
    run: Run, engine: Engine, ema: EMA, session: Session, tracker: Tracker | None, step: int
) -> tuple[float, tuple[str, ...]]:
    """Validate the EMA weights, and log the figures and a few samples; all ranks call it together.

    Args:
        run: with its manifest.
        engine: whose model computes.
        ema: weights to validate.
        session: this worker's place in its group.
        tracker: of rank 0; None: nothing is logged to MLflow.
        step: number of updates done.

    Returns:
        Value of the run's validation metric, perplexity (text) or loss in nats per masked token (images); and the
        samples of a text model, or the captions of those of a model of captions and images.
    """
    config, bos = run.config, run.manifest.special.bos
    reader = ShardReader(run.data_path, run.manifest, "validation")
    rows = validation_rows(len(reader), config.evaluation.rows)
    labels = reader.labels(rows) if config.model.classes is not None else None
    masking = likelihood.Masking.of(config, engine.model, bos is not None)
    share = (session.rank, session.workers)
    roles = reader.roles(rows)
    batches = likelihood.masked_batches(
        masking, reader.rows(rows), labels, roles=roles, share=share, device=session.device
    )
    with engine.weights(ema.slices) as model:
        sums = likelihood.row_sums(model, batches, len(rows)).to(session.device)
        dist.all_reduce(sums)
        # All ranks draw the same samples: under ZeRO-3 no rank can run the model alone.
        tokens, classes, revealed = draw(run, model, prompts_of(run, reader))
    bound = likelihood.summarise(sums.cpu(), masking, roles)
    metric = config.validation_metric
    value = bound.nats if metric == "loss" else bound.perplexity
    bits = run.manifest.bits_per_byte(bound.nats) if metric == "perplexity" else None
    if session.rank == 0:
        in_bits = "" if bits is None else f", {bits:.3f} bits per byte"
        log.info("step %d: validation %s%s", step, bound, in_bits)
    texts: tuple[str, ...] = ()
    if config.data.kind == "text":
        tokenizer, special = run.text_tokenizer, run.manifest.special
        texts = tuple(texts_of(tokens.numpy(), special.eot, special.pad, tokenizer.decode))
        if tracker:
            tracker.log_text("\n\n-----\n\n".join(texts), f"samples/step_{step:08d}.txt")
    elif config.data.kind == "pair":
        caption = run.manifest.caption or 0
        pair = pair_tokenizer(run, session.device)
        texts = tuple(pair.captions(tokens.numpy(), caption))
        if tracker:
            figure = captioned_grid(pair.images(tokens.numpy(), caption), texts)
            tracker.log_figure(figure, f"samples/step_{step:08d}.png")
    elif tracker:
        pictures = image_tokenizer(run, session.device, len(tokens)).decode(tokens[:, 1:].numpy())
        tracker.log_figure(sample_grid(pictures, classes), f"samples/step_{step:08d}.png")
        first_of_class = slice(None, None, PICTURES_A_CLASS)
        figure = unmasking_order(pictures[first_of_class], revealed[first_of_class, 1:].numpy())
        tracker.log_figure(figure, f"samples/order_{step:08d}.png")
    if tracker:
        values = {metric: value, "nats": bound.nats} | ({} if bits is None else {"bits_per_byte": bits})
        tracker.log_metrics({f"validation/{name}": number for name, number in values.items()}, step)
    return value, texts


def prompts_of(run: Run, reader: ShardReader) -> Known | None:
    """Return the prompts of the first held-out rows, to be answered, or their captions; None where rows have none.

    Args:
        run: with its manifest.
        reader: of the held-out rows.
    """
    if run.manifest.caption is not None:
        tokens = reader.rows(np.resize(np.arange(min(PAIRS, len(reader))), PAIRS)).astype(np.int64)
        given = np.broadcast_to(np.arange(reader.length) < run.manifest.caption, tokens.shape)
        return torch.from_numpy(tokens), torch.from_numpy(given.copy())
    if run.manifest.answer_block is None:
        return None
    rows = reader.read(np.resize(np.arange(min(TEXTS, len(reader))), TEXTS))
    assert rows.roles is not None
    given = rows.roles.known(reader.length)
    return torch.from_numpy(rows.tokens.astype(np.int64)), torch.from_numpy(given)


def draw(
    run: Run, model: Denoiser, known: Known | None = None
) -> tuple[Int[torch.Tensor, "B L"], list[int] | None, Int[torch.Tensor, "B L"]]:
    """Draw a few samples as the `sampling` section says.

    Args:
        run: with its manifest.
        model: to draw from.
        known: given tokens of the samples; None: none.

    Shape:
        B samples of L tokens.

    Returns:
        Tokens, class of every sample (None for an unconditional model), and the step that revealed each token.
    """
    config, manifest = run.config, run.manifest
    settings, bos, labels = config.sampling, manifest.special.bos, None
    if config.data.kind == "image":
        settings, labels = pictures_shown(run)
    elif config.data.kind == "pair":
        settings = pairs_shown(run)
    elif model.left_to_right:
        steps = manifest.length - (bos is not None)
        settings = SamplingConfig(num_samples=TEXTS, steps=steps, order="left_to_right", seed=settings.seed)
    else:
        settings = SamplingConfig(num_samples=TEXTS, steps=min(64, settings.steps), seed=settings.seed)
    revealed = torch.zeros(settings.num_samples, manifest.length, dtype=torch.int64)
    tokens = draw_rows(model, settings, manifest.facts, (0, settings.num_samples), revealed, known)
    return tokens.cpu(), labels, revealed


def pairs_shown(run: Run) -> SamplingConfig:
    """Say how images of a few held-out captions are drawn, which show a model of captions and images.

    Args:
        run: with its manifest.
    """
    settings, steps = run.config.sampling, run.manifest.length - (run.manifest.caption or 0)
    if run.config.model.kind == "ar":
        return settings.model_copy(update={"num_samples": PAIRS, "steps": steps, "order": "left_to_right"})
    return settings.model_copy(update={"num_samples": PAIRS, "steps": min(steps, settings.steps)})


def pictures_shown(run: Run) -> tuple[SamplingConfig, list[int] | None]:
    """Choose the images that show an image model: a few of each of the first classes.

    Args:
        run: with its manifest.

    Returns:
        How they are drawn, and the class of every one (None for an unconditional model).
    """
    settings, classes = run.config.sampling, run.config.model.classes
    chosen = class_ids(settings.labels or range(classes or 1), run.manifest.class_names)[:CLASSES_SHOWN]
    labels = [label for label in chosen for _ in range(PICTURES_A_CLASS)]
    settings = settings.model_copy(update={"labels": tuple(labels), "num_samples": len(labels)})
    return settings, None if classes is None else labels
