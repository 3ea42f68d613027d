"""One training: the Trainer's configuration, what it logs, and its processes."""
