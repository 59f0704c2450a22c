"""What all scripts say: lines with date and time. Standard library only.

    2025-11-25 14:12:03 server: listening on localhost:50051

A terminal can stand still for hours (Ctrl-S, `| less`, a pipe that nobody reads): then a plain
`print` stops the round. So what runs for long prints into a `Queued` file.
"""

import contextlib
import io
import math
import os
import queue
import select
import sys
import threading
import time

MAX_TEXTS = 10_000  # that wait to be written
MAX_CHARACTERS = 300  # of a text from outside
MAX_KEYS = 1000  # that `OncePerMinute` remembers: peers choose them
FLUSH_S = 1  # how long an end waits for an output that stands still


def say(who, line):
    """Say one line on stdout: `who` is the script, or the client's name."""
    write_line(sys.stdout, f"{who}: {line}")


def warn(who, line):
    """Say one line on stderr, so that stdout keeps to results."""
    write_line(sys.stderr, f"{who}: {line}")


def fail(who, sentence, code=1):
    """Say a user's mistake, or why a script ends, as one sentence on stderr; returns `code`."""
    flush()  # or, where both outputs go to one file, the error could stand before its cause
    warn(who, f"error: {sentence}")
    return code


def write_line(file, line):
    """Write one line with date and time into a text file, as all lines are."""
    # What others write stays text: no line of theirs moves the cursor, or looks like ours.
    file.write(_escaped(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}") + "\n")
    file.flush()


def plain(text):
    """A text from outside, for one line: control characters escaped, 300 characters at most."""
    text = _escaped(str(text))
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."


def _escaped(text):
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


class OncePerMinute:
    """say(line), but each key's lines only once a minute: one peer can cause them by thousands."""

    def __init__(self, say):
        self.say = say
        self.lock = threading.Lock()
        self.said = {}  # key -> (time.monotonic() of its last line, how many were left out since)

    def __call__(self, key, line):
        now = time.monotonic()
        with self.lock:
            said_at, left_out = self.said.get(key, (-math.inf, 0))
            is_new = now - said_at >= 60
            self.said[key] = (now, 0) if is_new else (said_at, left_out + 1)
            if len(self.said) > MAX_KEYS:
                del self.said[next(iter(self.said))]  # the oldest
        if is_new:
            self.say(line + (f" (and {left_out} more in the minute before)" if left_out else ""))


class Queued(io.TextIOBase):
    """A text file for which nobody waits: a thread of its own writes to the descriptor `fd`.

    What was not written yet is kept, the newest MAX_TEXTS texts of it.
    """

    outputs = []  # all of this process

    def __init__(self, fd):
        self.fd = fd
        self.lock = threading.Lock()
        self.texts = queue.Queue(MAX_TEXTS)
        self.left_out = 0  # texts, since that was last told
        self.outputs.append(self)
        threading.Thread(target=self._write_texts, daemon=True).start()

    def fileno(self):
        return self.fd

    def isatty(self):
        return os.isatty(self.fd)

    def write(self, text):
        with self.lock:
            if self.texts.full():
                with contextlib.suppress(queue.Empty):  # the thread was quicker
                    self.texts.get_nowait()
                    self.texts.task_done()
                    self.left_out += 1
            self.texts.put(text)

    def wait(self, timeout_s):
        """Wait until all is written, so long at most."""
        with self.texts.all_tasks_done:
            self.texts.all_tasks_done.wait_for(lambda: not self.texts.unfinished_tasks, timeout_s)

    def _write_texts(self):
        while True:
            text = self.texts.get()
            with self.lock:
                left_out, self.left_out = self.left_out, 0
            if left_out:
                text = f"... {left_out} lines are left out: nobody read them in time\n{text}"
            self._write(text)
            self.texts.task_done()

    def _write(self, text):
        # A file name on Linux is bytes, not text: what is no UTF-8 is written as \\udc..
        left = text.encode("utf-8", "backslashreplace")
        while left:
            try:
                left = left[os.write(self.fd, left) :]
            except BlockingIOError:  # whoever shares this terminal made it non-blocking
                select.select([], [self.fd], [])
            except OSError:
                return  # the reader went away: that ends no run


def flush():
    """Wait until everything that was said is written, FLUSH_S at most for each output."""
    for file in Queued.outputs:
        file.wait(FLUSH_S)
