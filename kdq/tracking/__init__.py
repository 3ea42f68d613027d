"""Weights & Biases: the run of a stage, the run of a sweep, the lineage of models, a saved workspace."""
