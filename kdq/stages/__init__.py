"""From a cell's config to its rows: train, quantize, deploy."""
