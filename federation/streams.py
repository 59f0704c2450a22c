"""Uploads and downloads while they move bytes: who stands still is ended, and holds up no one.

What one client can hold is one upload and one download, whatever it does: a newer one ends the
older. Each has a limit without progress, and one in total, so a byte every 29 s does not last.
"""

import threading
import time

from federation.rounds import Refused

STALL_S = 30  # a stream without progress for so long is ended
LOOK_EVERY_S = 0.25  # how often the watchdog looks
# In total a stream may take as long as a line of 10 kB/s needs for the model, and a minute.
SLOWEST_BYTES_PER_S = 10_000
EXTRA_S = 60
# An upload comes in pieces of 75 kB (the thesis demo) or more. Each message costs some time of the
# server's processor, however small it is, so their number is limited as well as their bytes.
SMALLEST_PIECE_BYTES = 10_000
EXTRA_MESSAGES = 100

# After a stream that failed the client's next one of its kind waits, PAUSE_FACTOR times as long as
# the failed one lasted: so failing on purpose takes a fifth of a thread. A client that lost its
# connection does not wait longer than LONGEST_PAUSE_S.
PAUSE_FACTOR = 4
LONGEST_PAUSE_S = 1

NEVER = float("inf")


class Streams:
    """All streams of a server. `run_watchdog` is for a thread of its own."""

    def __init__(self, say):
        self.say = say
        self.changed = threading.Condition()
        self.open = set()
        self.newest = {}  # (client, what) -> its newest Stream
        self.not_before = {}  # (client, what) -> when the next one may begin, time.monotonic()

    def begin(self, stream):
        """Open this stream: end the client's older one of this kind, and wait until it has ended.

        That is usually one of a connection that the client lost: it would hold a thread until it
        stalls. Waiting means that two of them never hold memory or a file at the same time.
        Raises Refused where a still newer one comes meanwhile.
        """
        with self.changed:
            self.open.add(stream)
            if stream.client is None:
                return
            self.newest[stream.key] = stream
            older = self._others(stream)
            self.changed.notify_all()  # an older one that waits here gives up
        if older:
            self.say(f"{stream.client} began a new {stream.what}: its unfinished one is ended")
        for other in older:
            other.context.cancel()
        with self.changed:
            while self._others(stream) or self._pause_s(stream) > 0:
                if self.newest.get(stream.key) is not stream:
                    self.end(stream)
                    raise Refused("CANCELLED", f"{stream.client} began another {stream.what}")
                self.changed.wait(max(0.01, self._pause_s(stream)))

    def _others(self, stream):
        return [other for other in self.open if other.key == stream.key and other is not stream]

    def _pause_s(self, stream):
        return self.not_before.get(stream.key, 0) - time.monotonic()

    def end(self, stream, failed=False):
        """Forget this stream.

        If it failed, the client's next one of this kind begins a little later: who makes them fail
        on purpose, again and again, has a share of one thread and not all of it.
        """
        now = time.monotonic()
        with self.changed:
            self.open.discard(stream)
            if self.newest.get(stream.key) is stream:
                del self.newest[stream.key]
            if failed and stream.client is not None:
                pause_s = min(LONGEST_PAUSE_S, PAUSE_FACTOR * (now - stream.opened))
                self.not_before[stream.key] = now + pause_s
            self.changed.notify_all()

    def run_watchdog(self):
        """End streams that are over one of their limits, for ever."""
        while True:
            time.sleep(LOOK_EVERY_S)
            now = time.monotonic()
            with self.changed:
                late = [stream for stream in self.open if now > stream.ends_at]
            for stream in late:
                self.say(f"{stream.describe_limit(now)}: ended")
                stream.limit(NEVER)  # or it is ended again until its thread has noticed
                stream.context.cancel()


class Stream:
    """One upload or download; a context manager. It has no limit until `limit` or `pass_on`.

    what    "upload" or "download"
    client  whose it is; None where nobody is named: such streams end no other
    """

    def __init__(self, streams, context, what, client=None):
        self.streams = streams
        self.context = context
        self.what = what
        self.client = client
        self.opened = time.monotonic()
        self.limit(NEVER)

    @property
    def key(self):
        return (self.client, self.what)

    def __enter__(self):
        self.streams.begin(self)
        self.opened = time.monotonic()
        return self

    def __exit__(self, kind, *_):
        self.streams.end(self, failed=kind is not None)

    @property
    def ends_at(self):
        return min(self.last_progress + self.stall_s, self.limited_since + self.total_s)

    def describe_limit(self, now):
        who = self.client or self.context.peer()
        if now > self.last_progress + self.stall_s:
            return f"{who} made no progress for {self.stall_s:g} s"
        return f"{who} needed more than {self.total_s:.0f} s for its {self.what}"

    def limit(self, stall_s, total_s=NEVER):
        """From now on, end it without progress for `stall_s` seconds, or after `total_s`."""
        self.limited_since = time.monotonic()
        self.last_progress = self.limited_since
        self.stall_s = stall_s
        self.total_s = total_s

    def pass_on(self, messages, max_bytes):
        """The same messages; each is progress. The limits hold until the last.

        max_bytes  how large the whole file can be: the total time follows from it
        Raises Refused where an upload comes in more messages than such a file needs.
        """
        max_messages = EXTRA_MESSAGES + max_bytes // SMALLEST_PIECE_BYTES
        self.limit(STALL_S, EXTRA_S + max_bytes / SLOWEST_BYTES_PER_S)
        for number, message in enumerate(messages):
            if number >= max_messages:
                raise Refused(
                    "INVALID_ARGUMENT",
                    f"{self.client}: the {self.what} comes in more than {max_messages} messages: "
                    "expected pieces of 100,000 characters, or of 1 MiB",
                )
            self.last_progress = time.monotonic()
            yield message
            self.last_progress = time.monotonic()
        self.limit(NEVER)
