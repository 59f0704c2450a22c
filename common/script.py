"""How scripts begin and end, and types of their arguments. Standard library only."""

import argparse
import ctypes
import io
import os
import re
import signal
import sys
from contextlib import suppress
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
    open_closed_outputs()
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

    def end(number, frame):
        log.say(who, last_words)
        end_script(128 + number)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def keep_heap_small():
    """Start this script again, as the same process, with memory settings for many threads.

    By itself glibc gives each thread a cache and every few threads a heap, and pieces and tensors
    leave holes in all of them, so the size would follow the number of clients. glibc reads these
    settings only when a process starts; a user's own stay, other C libraries ignore them.
    """
    if "GLIBC_TUNABLES" in os.environ:
        return
    settings = {
        "arena_max": 1,
        "tcache_count": 0,
        "mmap_threshold": 32 << 20,
        "trim_threshold": 4 << 20,
    }
    os.environ["GLIBC_TUNABLES"] = ":".join(
        f"glibc.malloc.{name}={value}" for name, value in settings.items()
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def trim_heap():
    """Give the memory of the heap's holes back to the operating system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
