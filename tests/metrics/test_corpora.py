"""Corpora that a model cannot read, and how likelihoods are reported."""

import math
from pathlib import Path

import pytest

from pipeline.config.load import parse
from pipeline.data.manifest import Split
from pipeline.errors import ConfigError, DataError
from pipeline.metrics.corpora import Corpus, check_fits, likelihood_group, open_corpora
from pipeline.metrics.likelihood import Likelihood
from pipeline.models.model_folder import DataFacts
from tests.support.small_manifest import small_manifest

EMPTY = {"files": (), "documents": 0, "tokens": 0, "tokens_dropped": 0}
MANIFEST = small_manifest(
    length=32,
    vocabulary=257,
    special={"eot": 256, "bos": None},
    tokenizer={"name": "bytes", "hash": "a" * 64},
    splits={"train": EMPTY, "validation": EMPTY},
)


def test_every_field_that_differs_is_named() -> None:
    corpus = Corpus("zero_shot/x", "/data/x", MANIFEST)
    with pytest.raises(DataError) as caught:
        check_fits(corpus, DataFacts(50257, 64, 256, 256), "b" * 64)
    assert str(caught.value).splitlines() == [
        "evaluation: the model cannot read /data/x (tokenizer 'bytes'):",
        "  length: the data has 32, the model 64",
        "  vocabulary: the data has 257, the model 50257",
        "  bos: the data has None, the model 256",
        "  tokenizer (hash): the data has 'aaaaaaaaaaaa', the model 'bbbbbbbbbbbb'",
    ]
    with pytest.raises(DataError, match="no validation rows"):
        check_fits(corpus, DataFacts(257, 32, None, 256), "a" * 64)


def test_corpora_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("a/web text", "b/web text", "c/books"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "manifest.json").write_text(MANIFEST.model_dump_json())
    paths = [f"{tmp_path}/a/web text", f"{tmp_path}/b/web text/", f"{tmp_path}/c/books"]
    found = [corpus.key for corpus in open_corpora(paths)]
    assert found == ["zero_shot/web_text-1", "zero_shot/web_text-2", "zero_shot/books"]


def test_a_bound_and_a_loss() -> None:
    corpus = Corpus("validation", "/data/x", MANIFEST)
    bound = likelihood_group(corpus, "Validation", Likelihood(2.0, 0.1, "count", 1, 9, 3))
    perplexity, nats = bound.measures
    assert perplexity.interval == pytest.approx((6.0739, 8.9892), rel=1e-4)  # exp(2 -+ 0.196)
    assert (nats.value, nats.by) == (2.0, "upper bound")
    assert bound.heading == (
        "Validation: data x, split validation, rows 9, estimator count, draws 1, seed 3, precision float32"
    )
    assert likelihood_group(corpus, "", Likelihood(2.0, 0.1, "exact", 1, 9, 3)).measures[0].by == ""
    (loss,) = likelihood_group(corpus, "", Likelihood(2.0, 0.1, "arccos", 1, 9, 3)).measures
    assert (loss.key, loss.value) == ("loss", 2.0)


def test_bits_per_byte_of_text_whose_bytes_are_known() -> None:
    part = {**EMPTY, "tokens": 300, "bytes": 1000}
    manifest = MANIFEST.model_copy(update={"splits": {"validation": Split.model_validate(part)}})
    corpus = Corpus("validation", "/data/x", manifest)
    *_, bits = likelihood_group(corpus, "", Likelihood(2.0, 0.1, "count", 1, 9, 3)).measures
    per_nat = 0.3 / math.log(2)
    assert (bits.key, bits.value, bits.by) == ("bits_per_byte", pytest.approx(2 * per_nat), "upper bound")
    assert bits.interval == pytest.approx((1.80400 * per_nat, 2.19600 * per_nat), rel=1e-4)


def test_settings_of_the_other_kind_of_data() -> None:
    for tree, says in [
        ({"features": "inception"}, "evaluation.features: 'inception' looks at images"),
        ({"weights": "a.pth"}, "weights 'a.pth' are for features inception, not None"),
    ]:
        with pytest.raises(ConfigError, match=says):
            parse({"name": "a", "evaluation": tree}, origin="test")
    image = {
        "name": "a",
        "data": {"kind": "image"},
        "evaluation": {"scorer": "gpt2"},
        "sampling": {"steps": 4},
    }
    with pytest.raises(ConfigError, match=r"evaluation\.scorer: 'gpt2' reads text"):
        parse(image, origin="test")
