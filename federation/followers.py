"""What else happens when a round has its scores: a command of the user's, or an event file.

None of it is part of a round: it runs beside the rounds in a thread of its own, and what fails
there is a line in the log. Standard library only.
"""

import json
import math
import os
import signal
import subprocess
import threading
import time

COMMAND_S = 60  # a command that takes longer is ended, so that the next round's can run
LAST_S = 90  # how long a server that ends waits for what is still to be told
MOST_LINES = 20  # of what a command says, in the log


class Follower:
    """Calls tell(state) in a thread of its own whenever there are new scores.

    rounds  the Rounds; its lock is not held while tell(state) runs
    tell    tell(state), with a RunState. Several changes may come as one.
    what    what it is, for the sentence that says that it failed
    """

    def __init__(self, rounds, tell, what):
        self.rounds = rounds
        self.tell = tell
        self.what = what
        self.told = None  # how much the state had that was told last
        self.is_last = False
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def finish(self):
        """Tell the last state, if it was not; wait until that is done, within LAST_S."""
        with self.rounds.changed:
            self.is_last = True
            self.rounds.changed.notify_all()
        self.thread.join(LAST_S)

    def _follow(self):
        while True:
            with self.rounds.changed:
                self.rounds.changed.wait_for(lambda: self.is_last or self._is_new())
                state = self.rounds.state
                is_last = self.is_last
                is_new = self._is_new()
                self.told = _how_much(state)
            if is_new:
                try:
                    self.tell(state)
                except Exception as error:
                    self.rounds.say(
                        f"warning: {self.what} failed: {type(error).__name__}: {error}; "
                        "the run goes on"
                    )
            if is_last:
                return

    def _is_new(self):
        return _how_much(self.rounds.state) != self.told


def _how_much(state):
    return len(state.history), len(state.client_scores)


class RoundCommand:
    """Runs the user's command (text, for the shell) after each round from now on.

    It gets the round as one line of JSON on its standard input:
    {"run": "1f0c...", "rounds": 10, "round": 3, "loss": 0.41, "auc": 0.93, ..., "missing": ""}
    A number that is not finite is null. A round that was evaluated just before the server was
    killed is not made up for.
    """

    def __init__(self, command, state, say):
        self.command = command
        self.say = say
        self.told = len(state.history)

    def tell(self, state):
        for row in state.history[self.told :]:
            self.told += 1
            finite = {name: _finite(value) for name, value in row.items()}
            self._run({"run": state.run, "rounds": state.rounds, **finite})

    def _run(self, row):
        started = time.monotonic()
        process = subprocess.Popen(
            self.command,
            shell=True,  # it is the user's own line, with pipes and quotes
            text=True,
            errors="replace",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all that it starts can be ended, and Ctrl-C is ours
        )
        which = f"--on-round of round {row['round']}"
        try:
            said, _ = process.communicate(json.dumps(row) + "\n", timeout=COMMAND_S)
        except subprocess.TimeoutExpired:
            _end_group(process)
            self.say(f"warning: {which} took more than {COMMAND_S} s: ended; the run goes on")
            return
        for line in said.splitlines()[:MOST_LINES]:
            self.say(f"{which}: {line}")
        if process.returncode:
            self.say(
                f"warning: {which} ended with exit code {process.returncode} after "
                f"{time.monotonic() - started:.1f} s; the run goes on"
            )


def _end_group(process):
    """End the shell and what it started. A child may hold the pipe: nobody reads it to its end."""
    os.killpg(process.pid, signal.SIGKILL)  # the shell is not waited for yet: the number is its own
    process.stdin.close()
    process.stdout.close()
    process.wait()


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
