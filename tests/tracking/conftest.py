"""A W&B account on this machine."""

from collections.abc import Iterator

import pytest
import wandb
from wandb.sdk.lib import wbauth

from kdq.tracking import wandb_run
from tests.wandb_server import WandbServer, wandb_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """The user is logged in to this server, in this process and those it starts."""
    with wandb_server() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(wandb_run, "_server", wandb_run._Server())
        wandb.teardown()  # this process keeps the address and the account it began with
        yield found
        assert "\n".join(found.unanswered) == ""
    wandb.teardown()
    wbauth.unauthenticate_session()
