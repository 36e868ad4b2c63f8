"""Predictions made before a run starts: parameters, memory, arithmetic, time and scaling."""
