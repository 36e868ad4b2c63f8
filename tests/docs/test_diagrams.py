"""The committed diagrams are what `docs/diagrams.py` draws."""

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def load_script() -> ModuleType:
    """Import the script, which is in no package, from its file."""
    spec = importlib.util.spec_from_file_location("diagrams", DOCS / "diagrams.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


diagrams = load_script()


def test_the_script_draws_every_committed_svg():
    assert sorted(diagrams.PICTURES) == sorted(path.name for path in diagrams.IMAGES.glob("*.svg"))


@pytest.mark.parametrize("name", sorted(diagrams.PICTURES))
def test_the_script_reproduces_the_committed_file(name: str):
    drawn = diagrams.PICTURES[name]().encode()
    assert drawn == (diagrams.IMAGES / name).read_bytes(), (
        "run `python docs/diagrams.py` and commit the result"
    )
    ElementTree.fromstring(drawn)


def test_text_that_does_not_fit_is_refused():
    drawing = diagrams.Drawing(100, 100, "a test")
    with pytest.raises(ValueError, match="does not fit"):
        drawing.box(10, 10, 40, 30, ["much too long for a box"])
    with pytest.raises(ValueError, match="leaves the picture"):
        drawing.text((90, 50), "beyond the edge")
