"""Post-training quantization: tensors in, tensors out; nothing here but callback.py knows of
Lightning, and nothing of Hydra or W&B."""
