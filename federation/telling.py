"""Where a client is while it works: told to its server, to a launcher, and to who looks on."""

import json
import os
import threading
import time

import grpc

from common import log
from common import progress as launcher
from federation import progress, tls
from generated import todo_pb2, todo_pb2_grpc

PIPE_EVERY_S = 0.2  # the eye sees no more
LINE_EVERY_S = 60  # within a long epoch
BAR_CHARACTERS = 20


class RoundClosed(Exception):
    """The round that this client trains for was closed without it."""


class Teller:
    """Tells where this client is, while it works: the server, a launcher, and the log.

    The server is told by a thread, every TELL_EVERY_S and only where it takes that; each time on a
    connection of its own, because routers and proxies drop silent ones. A launcher on this machine
    is told each change by a pipe (common/progress.py).

    client   its name
    task     run, round, rounds and takes_progress, as the server named them
    title    begins each line that is said here
    connect  connect() -> a gRPC channel to the server
    say      say(line): a line of the client's log
    """

    def __init__(self, client, task, title, connect, say):
        self.client = client
        self.task = task
        self.title = title
        self.connect = connect
        self.say = say
        self.where = {"phase": "loading"}  # of progress.PROGRESS_LIMITS
        self.over = threading.Event()
        self.round_closed = False
        self.began = None  # training, by time.monotonic()
        self.last_line = self.last_piped = time.monotonic()

    def __enter__(self):
        if self.task["takes_progress"]:
            threading.Thread(target=self._tell_until_over, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        log.show_status("")

    def now(self, phase):
        """This client is in another phase."""
        self.where = {"phase": phase}
        self._pipe(self.where)

    def at_step(self, epoch, epochs, step, steps, loss):
        """A batch is trained; step counts from 1. Raises RoundClosed."""
        now = time.monotonic()
        if self.began is None:
            self.began = self.last_line = now
        if self.round_closed:
            raise RoundClosed("the round was closed without this client")
        done = ((epoch - 1) * steps + step) / (epochs * steps)
        left_s = (now - self.began) * (1 - done) / done
        self.where = {
            "phase": "training",
            "epoch": epoch,
            "epochs": epochs,
            "seconds_left": round(left_s),
        }
        if now - self.last_piped >= PIPE_EVERY_S or step == steps:
            self.last_piped = now
            self._pipe({**self.where, "step": step, "steps": steps, "loss": loss})
            self._show(step, steps, loss)
        if now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            self.say(
                f"{self.title}: {progress.in_words(self.where)} ({step}/{steps} steps of this "
                f"epoch, loss {loss:.4f})"
            )

    def tell(self, stub, more_metadata=()):
        """Tell the server once; notes whether the round is still open. Raises grpc.RpcError."""
        request_metadata = (
            ("fedml-client", self.client),
            ("fedml-run", self.task["run"]),
            ("fedml-progress", json.dumps(self.where)),
            *more_metadata,
        )
        call = stub.getWeight(
            todo_pb2.void(), metadata=request_metadata, timeout=progress.TELL_EVERY_S
        )
        answer = dict(call.initial_metadata())
        for _ in call:  # no message, but the call's end
            pass
        same_run = answer.get("fedml-run") == self.task["run"]
        open_round = answer.get("fedml-round", "")
        if same_run and open_round.isdecimal() and int(open_round) > self.task["round"]:
            self.round_closed = True

    def _tell_until_over(self):
        # Not at once: the server has just seen this client fetch, and a round may take a second.
        while not self.over.wait(progress.TELL_EVERY_S):
            try:
                with self.connect() as channel:
                    self.tell(todo_pb2_grpc.FedMLStub(channel))
            except (grpc.RpcError, tls.FilesNotReady):
                pass  # a server that is away is missed, and told of, when it is needed

    def _show(self, step, steps, loss):
        """Without a launcher, a bar on the terminal; none where the epoch's own line follows."""
        if launcher.VARIABLE in os.environ:
            return
        filled = BAR_CHARACTERS * step // steps
        bar = filled * "#" + (BAR_CHARACTERS - filled) * "."
        text = f"{self.title}: {progress.in_words(self.where)}  [{bar}]  loss {loss:.4f}"
        log.show_status("" if step == steps else text)

    def _pipe(self, content):
        launcher.tell(round=self.task["round"], rounds=self.task["rounds"], **content)
