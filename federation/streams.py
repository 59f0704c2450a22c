"""Uploads and downloads while they move bytes: who stands still is ended, and holds up no one."""

import threading
import time
from contextlib import contextmanager, nullcontext

STALL_S = 30  # an upload or download without progress for so long is ended
LOOK_EVERY_S = 0.25  # how often the watchdog looks
# How many fast streams move a piece at the same time: 48 would fill the memory and win nothing.
# The limit is advisory; if its holders make no progress for TURN_S, others go ahead.
TURNS = 2
TURN_S = 0.5
FAST_S = 0.1  # a piece that takes longer is on a network below 10 MB/s, and needs no turn


class Streams:
    """All streams of a server. `run_watchdog` is for a thread of its own."""

    def __init__(self, say):
        self.say = say
        self.lock = threading.Lock()
        self.moving = set()
        self.uploading = {}  # client -> its newest upload that is not complete yet
        self.turns = threading.Semaphore(TURNS)
        self.moved = time.monotonic()  # when a holder of a turn last made progress

    def begin(self, stream):
        """Watch this stream; an older half-sent upload of the same client is ended.

        That one is of a connection that the client lost: it would hold a thread until it stalls.
        """
        older = None
        with self.lock:
            self.moving.add(stream)
            if stream.client is not None:
                older = self.uploading.get(stream.client)
                self.uploading[stream.client] = stream
        if older is not None:
            self.say(f"{stream.client} began a new upload: its half-sent one is ended")
            older.context.cancel()

    def end(self, stream):
        with self.lock:
            self.moving.discard(stream)
            if self.uploading.get(stream.client) is stream:
                del self.uploading[stream.client]

    def run_watchdog(self):
        """End streams that stand still, for ever."""
        while True:
            time.sleep(LOOK_EVERY_S)
            now = time.monotonic()
            with self.lock:
                stalled = [each for each in self.moving if now - each.last > each.limit_s]
            for stream in stalled:
                who = stream.client or stream.context.peer()
                self.say(f"{who} made no progress for {stream.limit_s} s: ended")
                stream.context.cancel()


class Stream:
    """One upload or download while it moves bytes; a context manager.

    limit_s  without progress for so many seconds it is ended
    client   whose upload it is; None for a download, or where the name is not known yet
    """

    def __init__(self, streams, context, limit_s, client=None):
        self.streams = streams
        self.context = context
        self.limit_s = limit_s
        self.client = client
        self.last = time.monotonic()  # of the last progress

    def __enter__(self):
        self.streams.begin(self)
        return self

    def __exit__(self, *_):
        self.streams.end(self)

    @contextmanager
    def turn(self):
        streams = self.streams
        has_turn = streams.turns.acquire(blocking=False)
        while not has_turn:
            left_s = streams.moved + TURN_S - time.monotonic()
            if left_s <= 0:
                break
            has_turn = streams.turns.acquire(timeout=left_s)
            self.last = time.monotonic()  # who waits for a turn does not stall
        if not has_turn:
            yield
            return
        streams.moved = time.monotonic()
        try:
            yield
        finally:
            streams.moved = time.monotonic()
            streams.turns.release()

    def pass_on(self, messages, in_turns=True):
        """The same messages; each is progress."""
        messages = iter(messages)
        fast = True
        while True:
            with self.turn() if in_turns and fast else nullcontext():
                started = time.monotonic()
                self.last = started
                message = next(messages, None)
                if message is None:
                    return
                self.last = time.monotonic()
                yield message
                message = None  # or each stream that waits for its turn would hold one
            fast = time.monotonic() - started < FAST_S
