"""How scripts begin and end, and types of their arguments. Standard library only."""

import argparse
import io
import os
import re
import signal
import stat
import sys
import threading
from pathlib import Path

from common import log

# A client's name is also the name of its folder: no path separator, no leading dot, at most 64.
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def start_script():
    """Prepare the process for a script's output; call it before the first package is imported.

    A package that is not installed is then one sentence in place of a traceback, and no terminal
    and no pipe can hold the script up, or end it.
    """
    # HDF5 locks each file that it opens, and fails where a network file system has no locks. Our
    # folders are held by one process already (files.alone_in).
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
    # gRPC's own lines: one for each failed handshake of whoever reaches the port.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    open_closed_outputs()
    let_no_one_wait_for_stderr()
    sys.stdout = Output(1)
    sys.stderr = Output(2)
    log.start()
    sys.excepthook = explain_missing_package


def end_script(code):
    """End the process with this exit code; None is 0.

    At once, without joining threads or unloading TensorFlow: all files are already on disk.
    """
    sys.stdout.flush()
    log.flush()
    os._exit(code or 0)


def open_closed_outputs():
    """Open /dev/null where stdin, stdout or stderr is closed (`>&-`).

    Otherwise the next file that this process opens would get that number, and be what we print to.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one


def let_no_one_wait_for_stderr():
    """Make stderr non-blocking where it is a terminal or a pipe.

    gRPC and TensorFlow write there from threads of their own (each failed handshake is a line):
    these lines are lost while nobody reads, instead of holding a thread that serves clients. It is
    opened anew, because a setting of the open file would hold for all who share the terminal.
    """
    mode = os.fstat(2).st_mode
    if not (stat.S_ISFIFO(mode) or os.isatty(2)):
        return
    try:
        own_fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return  # another user's terminal (su), or no /proc: it stays as it is
    os.dup2(own_fd, 2)
    os.close(own_fd)


class Output(io.TextIOWrapper):
    """sys.stdout or sys.stderr, for what is printed: a reader that went away does not end a script.

    A file name on Linux is bytes, not text: what cannot be encoded is printed as \\udc..
    """

    def __init__(self, fd):
        buffered = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
        super().__init__(buffered, "utf-8", "backslashreplace", line_buffering=True)

    def write(self, text):
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self):
        try:
            super().flush()
        except (OSError, RuntimeError):
            pass  # RuntimeError: a signal handler interrupted a write


def explain_missing_package(kind, error, trace):
    """A sys.excepthook: one sentence for a missing package, Python's own traceback for all else."""
    if kind is not ModuleNotFoundError:
        sys.__excepthook__(kind, error, trace)
        return
    log.fail(
        Path(sys.argv[0]).name,
        f"{sys.executable} has no package {error.name!r}: start it with .venv/bin/python, which "
        "`bash setup.sh requirements.txt` makes, or pip install -r requirements.txt",
    )


def client_name(text):
    """An argparse type: a client's name, as the server's --clients lists it."""
    if not CLIENT_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r}: expected letters, digits, '.', '_', '-', at most 64"
        )
    return text


def at_least(least, most=999_999_999):
    """An argparse type: a whole number from `least` to `most`; the wire takes nine digits."""

    def whole_number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is too large, expected at most {most}")
        return int(text)

    return whole_number


pixels = at_least(16, 4096)  # a side of an image


def seconds(text):
    """An argparse type: seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def exit_on_signals(who, last_words):
    """End the process at once on SIGINT (exit code 130) or SIGTERM (143).

    Nothing has to be finished first: every published file is whole at every instant.
    """

    def end(number):
        log.say(who, last_words)
        end_script(128 + number)

    watch_signals([signal.SIGINT, signal.SIGTERM], end)


def end_when_a_thread_dies(who):
    """From here on an exception that ends a thread ends the process, with exit code 1.

    It is started again, and goes on; with a thread less it would look alive, and serve nobody.
    """

    def end(death):
        if death.exc_type is not SystemExit:
            threading.__excepthook__(death)
            log.fail(who, f"a thread died ({death.exc_type.__name__}): start it again to go on")
            end_script(1)

    threading.excepthook = end


def watch_signals(numbers, on_signal):
    """Call on_signal(number) for every signal that arrives, in a thread of its own.

    Python runs a handler only when its main thread gets to it. But of two signals that arrive at
    once, another thread can take both: the main thread then sleeps on in its system call, and
    neither is noticed. The wake-up pipe is written by whichever thread the signal meets.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in numbers:
        signal.signal(number, lambda number, frame: None)

    def forget():
        # A forked process has no such thread, and would write its signals into our pipe.
        signal.set_wakeup_fd(-1)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    def watch():
        while True:
            number = os.read(reading, 1)[0]
            if number in numbers:
                on_signal(number)

    os.register_at_fork(after_in_child=forget)
    threading.Thread(target=watch, daemon=True).start()
