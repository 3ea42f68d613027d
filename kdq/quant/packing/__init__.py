"""Quantized networks as files of the promised size."""
