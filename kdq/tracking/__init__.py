"""The log of a stage: W&B, CSV files or nowhere; the lineage of models, a saved workspace."""
