"""The commands, one file each: ``kdq``, ``kdq-export``, ``kdq-report``, ``kdq-reproduce`` and ``kdq-wandb``."""
