"""Marks this folder as the package ``kdq.conf`` inside the wheel, where Hydra finds it as ``pkg://kdq.conf``."""
