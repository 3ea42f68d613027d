"""Hydra finds the sweeper in this namespace; it is chosen by ``hydra/sweeper: kdq``."""
