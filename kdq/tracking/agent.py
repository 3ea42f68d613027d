"""``wandb agent``: which run of a W&B sweep this command was started for."""

import os

_NAMES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
#: What the agent says, by variable; empty without one. It is taken out of the environment, or W&B would make the run of
#: every stage, here and in processes that this one starts, the one that the agent waits for.
AGENT = {name: os.environ.pop(name) for name in _NAMES if name in os.environ}
