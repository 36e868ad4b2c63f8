"""From documents to shards of token rows, and from shards to the batches of training."""
