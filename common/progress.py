"""Where a script is, for the launcher's line of it on a terminal. Standard library only.

launch.py starts a script with a pipe, whose number is in the environment variable
FEDML_PROGRESS_FD. The script writes a JSON object a line into it, and the launcher draws it.
Started by hand, a script has no such pipe, and nothing is written.
"""

import json
import os
import time

VARIABLE = "FEDML_PROGRESS_FD"
SHORTEST_PAUSE_S = 0.2  # the eye sees no more, and a batch may take a millisecond

_next_at = 0  # time.monotonic(), from when on the next step may be told


def tell(phase, **numbers):
    """Tell a new phase: loading, training, scoring or waiting; numbers as in `tell_step`."""
    global _next_at
    _next_at = 0
    _write({"phase": phase, **numbers})


def tell_step(**numbers):
    """Tell a step of training: round, rounds, epoch, epochs, step, steps, loss.

    Not each is written.
    """
    global _next_at
    now = time.monotonic()
    if now >= _next_at:
        _next_at = now + SHORTEST_PAUSE_S
        _write({"phase": "training", **numbers})


def _write(what):
    fd = os.environ.get(VARIABLE)
    if fd is None:
        return
    try:
        os.set_blocking(int(fd), False)  # a launcher that is stopped stops no training
        # Less than a pipe takes in one piece, so that lines of one script never mix.
        os.write(int(fd), (json.dumps(what) + "\n").encode())
    except (OSError, ValueError):
        pass  # the launcher is gone, or reads nothing: that ends no training
