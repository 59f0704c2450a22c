"""What all scripts say: lines with date and time, which nobody waits for. Standard library only.

    2025-11-25 14:12:03 server: listening on localhost:50051

A terminal can stand still for hours (Ctrl-S, `| less`, a pipe that nobody reads): then a plain
`print` stops the round. So a line goes into a queue, and a thread writes it. The queue keeps the
newest MAX_LINES lines; at the end of the process it is waited for FLUSH_S at most.
"""

import atexit
import contextlib
import logging
import math
import os
import queue
import select
import sys
import threading
import time

MAX_LINES = 10_000
MAX_CHARACTERS = 300  # of a text from outside
MAX_KEYS = 1000
FLUSH_S = 1
LINE_FORMAT = "%(asctime)s %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

# One logger for all scripts: a line names its speaker itself, for the launcher's log joins several.
LOGGER = logging.getLogger("fedml")
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False


def say(who, line):
    """Say one line on stdout: `who` is the script, or the client's name."""
    LOGGER.info("%s: %s", who, line)


def warn(who, line):
    """Say one line on stderr, so that stdout keeps to results."""
    LOGGER.warning("%s: %s", who, line)


def fail(who, sentence, code=1):
    """Say a user's mistake, or why a script ends, as one sentence on stderr; returns `code`."""
    flush()  # or, where both outputs go to one file, the error could stand before its cause
    LOGGER.error("%s: error: %s", who, sentence)
    return code


def plain(text):
    """A text from outside, for one line: control characters escaped, 300 characters at most."""
    text = _escaped(str(text))
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."


def _escaped(text):
    if text.isprintable():
        return text
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
            said_at, left_out = self.said.pop(key, (-math.inf, 0))
            is_new = now - said_at >= 60
            self.said[key] = (now, 0) if is_new else (said_at, left_out + 1)
            if len(self.said) > MAX_KEYS:
                del self.said[next(iter(self.said))]  # the oldest
        if is_new:
            self.say(line + (f" (and {left_out} more in the minute before)" if left_out else ""))


@contextlib.contextmanager
def below_the_lines():
    """A rich Console for what is redrawn below the lines; None where stdout is no terminal.

    What it draws goes the way of the lines: a terminal that stands still holds nobody up.
    """
    handler = next((each for each in LOGGER.handlers if getattr(each, "fd", None) == 1), None)
    if handler is None or not os.isatty(1) or os.environ.get("TERM", "dumb") == "dumb":
        yield None
        return
    from rich.console import Console  # here: only scripts that draw need the package

    handler.console = Console(file=_ToQueue(handler), force_terminal=True, highlight=False)
    try:
        yield handler.console
    finally:
        handler.console = None


class _ToQueue:
    """A file whose text goes into a handler's queue, for rich."""

    def __init__(self, handler):
        self.handler = handler

    def write(self, text):
        self.handler.put(text)

    def flush(self):
        pass


class _Formatter(logging.Formatter):
    def format(self, record):
        # What others write stays text: no line of theirs moves the cursor, or looks like ours.
        return _escaped(super().format(record))


class _Direct(logging.Handler):
    """Writes at once to sys.stdout or sys.stderr, whatever these are now.

    For a process that did not call `start`: a test, or a program that imports a module of ours.
    """

    def emit(self, record):
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(self.format(record), file=stream, flush=True)


class _Queued(logging.Handler):
    """Puts lines into a queue; a thread of its own writes them to the file descriptor `fd`.

    The queue is a SimpleQueue: a signal handler may put a line while the main thread puts one.
    """

    def __init__(self, fd):
        super().__init__()
        self.fd = fd
        self.lines = queue.SimpleQueue()
        self.dropped = 0  # lines, since that was last told
        self.write_began = None  # time.monotonic(), while the thread writes
        self.console = None  # rich's, while it draws below the lines
        threading.Thread(target=self._write_lines, daemon=True).start()

    def emit(self, record):
        line = self.format(record)
        if self.console is not None:
            self.console.print(line, markup=False, soft_wrap=True)  # above what it draws
        else:
            self.put(line + "\n")

    def put(self, text):
        while self.lines.qsize() >= MAX_LINES:
            self._drop_oldest()
        self.lines.put(text)

    def _drop_oldest(self):
        try:
            oldest = self.lines.get_nowait()
        except queue.Empty:
            return  # the thread was quicker
        if isinstance(oldest, threading.Event):
            oldest.set()
        else:
            self.dropped += 1

    def flush(self):
        """Wait until the lines so far are written, FLUSH_S at most.

        A thread that has stood still for so long already is not waited for any more.
        """
        began = self.write_began
        stood_still_s = 0 if began is None else time.monotonic() - began
        written = threading.Event()
        self.lines.put(written)
        written.wait(max(0, FLUSH_S - stood_still_s))

    def _write_lines(self):
        while True:
            item = self.lines.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            with self.lock:
                dropped, self.dropped = self.dropped, 0
            self.write_began = time.monotonic()
            if dropped:
                self._write(f"... {dropped} lines are left out here: nobody read them in time\n")
            self._write(item)
            self.write_began = None

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


def _use(*handlers):
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
    for handler in handlers:
        handler.setFormatter(_Formatter(LINE_FORMAT, DATE_FORMAT))
        LOGGER.addHandler(handler)


def start():
    """From here on nobody waits for the output: each of stdout and stderr gets a queue."""
    out, err = _Queued(1), _Queued(2)
    out.addFilter(lambda record: record.levelno < logging.WARNING)
    err.setLevel(logging.WARNING)
    _use(out, err)
    atexit.register(flush)  # for a script that ends by sys.exit, as argparse does


def flush():
    """Wait until everything that was said is written, FLUSH_S at most for each output."""
    for handler in LOGGER.handlers:
        handler.flush()


_use(_Direct())
