"""Adapters: small updates of a model's weights that are trained and stored without the model."""
