"""Metrics of models and their samples, used in training and evaluation."""
