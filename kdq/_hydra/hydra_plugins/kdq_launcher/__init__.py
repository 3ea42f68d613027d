"""Hydra finds the launchers in this namespace; ``hydra/launcher=local``, ``slurm`` and ``ray`` choose them."""
