"""A task of lm-evaluation-harness over a local file."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml


def write_task(into: Path, questions: Sequence[dict[str, object]]) -> None:
    """A multiple choice over a local file."""
    into.mkdir(parents=True, exist_ok=True)
    (into / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    task = {
        "task": "continuation",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(into / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (into / "continuation.yaml").write_text(yaml.safe_dump(task))
