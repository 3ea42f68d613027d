"""The commands: ``kdq``, ``kdq-export``, ``kdq-report`` and ``kdq-wandb``, one file each."""
