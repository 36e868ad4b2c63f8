"""Noise schedule, partitions and objective."""
