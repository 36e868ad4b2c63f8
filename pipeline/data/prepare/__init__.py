"""Preparation of token shards from text and images with Ray Data."""
