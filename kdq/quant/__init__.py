"""Post-training quantization: tensors in, tensors out; nothing here knows of Hydra, Lightning or W&B."""
