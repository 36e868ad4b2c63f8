"""The report of an evaluation: nothing is lost on the way to metrics, JSON and the terminal."""

import json
import math

from pipeline.reports.measures import Group, Measure, Report

REPORT = Report(
    "runs/a/model",
    {"kind": "pgm", "step": 5},
    [
        Group(
            "validation", "Validation", {"rows": 9}, [Measure("nats", "nats per token", 2.5, (2.25, 2.75))]
        ),
        Group(
            "samples",
            "Samples",
            {"samples": 4, "seed": 0},
            [Measure("psnr", "PSNR, dB", math.inf), Measure("rate", "tokens/s", 12345.6, by="wall clock")],
        ),
    ],
)


def test_metrics() -> None:
    assert REPORT.metrics() == {
        "evaluation/validation/nats": 2.5,
        "evaluation/validation/nats_low": 2.25,
        "evaluation/validation/nats_high": 2.75,
        "evaluation/samples/rate": 12345.6,
    }


def test_json() -> None:
    tree = json.loads(REPORT.to_json())
    assert tree["model"] == "runs/a/model"
    first, second = tree["groups"]
    assert first["how"] == {"rows": 9}
    assert first["figures"] == [
        {"key": "nats", "name": "nats per token", "value": 2.5, "interval": [2.25, 2.75], "by": ""}
    ]
    assert [figure["value"] for figure in second["figures"]] == [None, 12345.6]


def test_text_is_aligned() -> None:
    lines = REPORT.to_text().splitlines()
    assert lines[0] == "runs/a/model: kind pgm, step 5"
    assert lines[2:] == [
        "Validation: rows 9",
        "  nats per token  2.5000  2.2500 to 2.7500",
        "Samples: samples 4, seed 0",
        "  PSNR, dB           inf",
        "  tokens/s        12,346                    wall clock",
    ]
