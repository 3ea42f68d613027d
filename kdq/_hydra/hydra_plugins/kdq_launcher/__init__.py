"""Hydra finds the launchers in this namespace; ``hydra/launcher=local`` and ``hydra/launcher=slurm`` choose them."""
