"""Messages, argument types and signals that all scripts share. Standard library only."""

import argparse
import ctypes
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

# A client's name is also the name of its folder: no path separator, no leading dot, at most 64.
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def start_script():
    """Prepare the process for a script's output; call it before the first package is imported.

    A package that is not installed is then one sentence in place of a traceback.
    """
    sys.excepthook = explain_missing_package
    # A file name on Linux is bytes, not text: print what cannot be decoded as \\x.. instead of
    # failing.
    sys.stdout.reconfigure(errors="backslashreplace")


def explain_missing_package(kind, error, trace):
    """A sys.excepthook: one sentence for a missing package, Python's own traceback for all else."""
    if kind is not ModuleNotFoundError:
        sys.__excepthook__(kind, error, trace)
        return
    fail(
        Path(sys.argv[0]).name,
        f"{sys.executable} has no package {error.name!r}: start it with .venv/bin/python, which "
        "`bash setup.sh requirements.txt` makes, or pip install -r requirements.txt",
    )


def say(who, line, to=None):
    """Print one line in one write, because several processes share a terminal.

    A reader that went away must not end a run of days, so a failed write is ignored.
    """
    try:
        to = to or sys.stdout
        to.write(f"{who}: {line}\n")
        to.flush()
    except OSError:
        pass


def fail(who, sentence, code=1):
    """Print a user's mistake as one sentence on stderr; returns the exit code."""
    say(who, f"error: {sentence}", sys.stderr)
    return code


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


def exit_on_signals(last_words):
    """End the process at once on SIGINT (exit code 130) or SIGTERM (143).

    Nothing has to be finished first: every published file is whole at every instant.
    """

    def end(number, frame):
        # os.write, because a handler may interrupt print within itself.
        os.write(1, f"{last_words}\n".encode())
        os._exit(128 + number)

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
