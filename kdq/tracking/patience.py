"""How long a command waits for a server, in all: then it goes on without."""

import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

#: Seconds of a wait that ends well which cost nothing, so that a long grid with a healthy server stays online.
FREE = 2.0


class Patience:
    """Seconds that this process still waits for a server that does not answer.

    Example:
        >>> patience = Patience(1.0)
        >>> patience.wait(lambda: 2 + 2)
        4
    """

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def wait(self, ask: Callable[[], Any], at_least: float = 0.0) -> Any:
        """What ``ask`` returns, where it does so in time.

        ``ask`` runs in a thread: no timeout of a client's own covers all that it may wait for.

        Args:
            at_least: seconds to wait even if none are left.

        Raises:
            TimeoutError: it did not end in time, or no time is left. It may still be running.
        """
        answer = futures.Future[Any]()

        def run() -> None:
            try:
                answer.set_result(ask())
            except BaseException as error:
                answer.set_exception(error)

        limit, start = max(self.left, at_least), time.monotonic()
        if limit > 0:
            threading.Thread(target=run, daemon=True).start()
            futures.wait([answer], limit)
        answered, took = answer.done(), time.monotonic() - start
        self.left = max(0.0, self.left - (max(0.0, took - FREE) if answered and not answer.exception() else took))
        if not answered:
            raise TimeoutError("the server does not answer")
        return answer.result()
