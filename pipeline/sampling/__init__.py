"""Orders of revelation, draws and the one sampling loop."""
