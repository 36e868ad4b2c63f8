"""Speed measurements of training, sampling and text preparation."""
