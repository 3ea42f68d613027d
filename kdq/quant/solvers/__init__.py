"""One layer: its alphabet, and the solvers that choose values of it."""
