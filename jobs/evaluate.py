"""Evaluate a model: likelihood, samples, and metrics that compare the samples with real data.

    python -m jobs.evaluate configs/text/quickstart.yaml
    python -m jobs.evaluate configs/evaluate/compare.yaml
    python -m jobs.evaluate configs/evaluate/zero_shot.yaml sampling.model=FOLDER
    python -m jobs.evaluate configs/evaluate/downstream.yaml sampling.model=FOLDER

The model is the run's own, or `sampling.model`. With `evaluation.models` several models are compared: likelihood,
quality against sampling speed, convergence. With `evaluation.zero_shot`, the likelihood of other texts is measured,
and with `evaluation.tasks` questions of lm-evaluation-harness are answered.
"""

from jobs.cli import main
from pipeline.config.schema import RunConfig
from pipeline.evaluation import convergence, frontier
from pipeline.evaluation.comparison import compare
from pipeline.evaluation.downstream import downstream
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.zero_shot import zero_shot
from pipeline.logs import shown
from pipeline.reports.measures import Report
from pipeline.reports.page import HTML
from pipeline.reports.tables import aligned


def run(config: RunConfig) -> None:
    """Evaluate or compare, print the tables and where the files are.

    Args:
        config: of the evaluation.
    """
    if config.evaluation.zero_shot:
        judged = zero_shot(config)
        _show(aligned(judged.table), judged.folder, judged.tracking_uri)
        return
    if config.evaluation.tasks:
        answered = downstream(config)
        _show(aligned(answered.table), answered.folder, answered.tracking_uri)
        return
    if not config.evaluation.models:
        result = evaluate(config)
        _show(result.report.to_text(), result.folder, result.tracking_uri)
        return
    compared = compare(config)
    about = {"models": len(compared.likelihoods)}
    parts = [Report(f"comparison {config.name}", about, compared.likelihoods).to_text()]
    parts += [aligned(frontier.table(compared.points))]
    if compared.curves:
        parts.append(aligned(convergence.table(compared.curves, compared.metric)))
    _show("\n\n".join(parts), compared.folder, compared.tracking_uri)


def _show(text: str, folder: str, uri: str) -> None:
    print(f"\n{text}\n\nreport  {folder}/{HTML}\nMLflow  {shown(uri)}")


if __name__ == "__main__":
    main(run)
