"""Tests on a CUDA device: `pytest -m gpu`."""
