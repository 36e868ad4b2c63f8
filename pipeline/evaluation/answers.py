"""Evaluation of a model of prompts and answers: how many held-out prompts it answers exactly."""

import numpy as np
import torch
from jaxtyping import Bool, Integer

from pipeline.config.evaluation import SamplingConfig
from pipeline.evaluation.evaluated_model import EvaluatedModel
from pipeline.metrics.corpora import Corpus
from pipeline.metrics.draw import Sampler, batches_of, describe
from pipeline.models.batch import Roles
from pipeline.reports.measures import Group, share_measure
from pipeline.run import Run
from pipeline.runtime.actors import in_order, started
from pipeline.training.validation import validation_rows


def answers_group(run: Run, corpus: Corpus, model: EvaluatedModel) -> Group:
    """Draw an answer to every held-out prompt, and count those that are the held-out answer.

    Args:
        run: of the evaluation.
        corpus: its data, of prompts and answers.
        model: folder of a model of prompts and answers.

    Returns:
        The report's group of the result.
    """
    reader, eot = corpus.reader("validation"), corpus.manifest.special.eot
    index = validation_rows(len(reader), run.config.evaluation.rows)
    rows = reader.read(index)
    tokens, roles = rows.tokens.astype(np.int64), rows.roles
    assert roles is not None
    assert eot is not None
    given = roles.known(tokens.shape[1])
    settings: SamplingConfig = run.config.sampling.model_copy(update={"num_samples": len(index)})
    tasks = []
    for first, count in batches_of(settings):
        known = (torch.from_numpy(x[first : first + count]) for x in (tokens, given))
        tasks.append((model.folder, settings, first, count, tuple(known)))
    with started(Sampler, (run.resources.cpus,), run.resources, len(tasks)) as samplers:
        drawn = np.concatenate([batch.tokens for batch in in_order(samplers, "draw", tasks)])
    exact = share_measure("exact", "exact answers", exact_answers(drawn, tokens, roles, eot))
    return Group("answers", "Answers", describe(settings, len(index)) | {"split": "validation"}, [exact])


def exact_answers(
    drawn: Integer[np.ndarray, "n L"], rows: Integer[np.ndarray, "n L"], roles: Roles, eot: int
) -> Bool[np.ndarray, "n"]:
    """Tell which answers are those of the data, up to the first end of text.

    Args:
        drawn: rows with their prompts.
        rows: of the data, with the same prompts.
        roles: of the rows.
        eot: id of the end of text.
    """
    targets = roles.targets(rows.shape[1], bos=True)
    ends = targets & (rows == eot)
    answer = targets & (ends.cumsum(1) - ends == 0)
    return ((drawn == rows) | ~answer).all(1)
