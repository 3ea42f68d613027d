"""A grid of cells as jobs in waves: every model once, nothing that is there already, no job that waits for another."""
