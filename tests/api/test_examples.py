"""The code that documentation shows runs: examples of docstrings, and the Python of README and docs/sampling.md."""

import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import api, load_model
from pipeline.api import Model, TokenModel
from pipeline.api.pairs import PairModel
from pipeline.config.load import load
from pipeline.data.prepare.captions import describe_digits, digits
from pipeline.data.tokenizers import ByteTokenizer, PairTokenizer
from pipeline.data.tokenizers.fast import train_bpe
from pipeline.models import build, model_folder
from pipeline.models.model_folder import DataFacts
from pipeline.models.vq import fit_patches
from pipeline.sampling.logits import Filters
from tests.support.small_models import shake

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHER_MODEL = re.compile(r'load_model\("(?!runs/(image_|pair_)?quickstart/)')
NAMES = {"np": np, "torch": torch, "load_model": load_model, "Filters": Filters}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with untrained models of the sizes and tokenizers of the quickstarts and of the exercises."""
    root = tmp_path_factory.mktemp("quickstarts")
    pixels = load_digits().images[:500].astype(np.uint8) * 15
    bpe, patches = train_bpe(1024, topics.values()), fit_patches(np.stack([pixels] * 3, -1), 128, 2, seed=0)
    pair = PairTokenizer(train_bpe(320, describe_digits(*digits())), patches)
    answers = DataFacts(257, 64, 256, 256, 256, (0,) * 64 + (1,), answer_block=8, template="plain")
    for path, tokenizer, facts in (
        ("text/quickstart", bpe, DataFacts(bpe.vocab_size, 64, bpe.eot, bpe.eot)),
        ("image/quickstart", patches, DataFacts(128, 16, None, None)),
        ("text/finetune_exercises", ByteTokenizer(), answers),
        ("pair/quickstart", pair, DataFacts(448, 26, None, 319, caption=10, text_ids=320)),
    ):
        config = load(ROOT / f"configs/{path}.yaml")
        model = build(config.model, facts.vocab_size, facts.length, facts.bos, facts.modalities)
        weights = shake(model).state_dict()
        folder = root / "runs" / config.name / "model"
        model_folder.write(folder, config.model, facts, weights, model_folder.Background())
        tokenizer.save(folder)
    Image.fromarray(np.stack([pixels[3]] * 3, -1)).save(root / "digit.png")
    Image.fromarray(np.repeat([0, 255], 4).astype(np.uint8)[:, None].repeat(8, 1)).save(root / "mask.png")
    return root


def examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for item in (TokenModel, PairModel, Model, api.load_model):
        yield from finder.find(item, item.__name__, module=inspect.getmodule(item), globs=dict(NAMES))


EXAMPLES = [test for test in examples() if test.examples]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_of_docstrings(
    example: doctest.DocTest, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(models)
    doctest.DocTestRunner().run(example)
    report = capsys.readouterr().out
    assert not report, report


def test_every_method_has_an_example() -> None:
    methods = {
        f"{owner.__name__}.{name}"
        for owner in (TokenModel, PairModel, Model)
        for name, item in vars(owner).items()
        if inspect.isfunction(item) and not name.startswith("_")
    }
    assert {*methods, "load_model"} == {example.name for example in EXAMPLES}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md", "docs/pairs.md"])
def test_code_of_pages(page: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, as a reader would paste them; some load models of the hub."""
    monkeypatch.chdir(models)
    names: dict[str, Any] = {}
    blocks = FENCE.findall((ROOT / page).read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        code = compile(block, page, "exec")
        if not OTHER_MODEL.search(block):
            exec(code, names)
