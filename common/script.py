"""How scripts begin and end, and types of their arguments. Standard library only."""

import argparse
import atexit
import math
import os
import re
import signal
import sys
import threading
from pathlib import Path

from common import log

# A client's name is also the name of its folder: no path separator, no leading dot, at most 64.
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SHOW_CURSOR = "\x1b[?25h"


def start_script(never_waits=False):
    """Prepare the process for a script's output; call it before the first package is imported.

    A package that is not installed is then one sentence in place of a traceback.
    never_waits: for what runs for long: no terminal and no pipe can hold the script up, or end it.
    """
    # HDF5 locks each file that it opens, and fails where a network file system has no locks. Our
    # folders are held by one process already (files.alone_in).
    os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
    # gRPC's own lines: one for each failed handshake of whoever reaches the port.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    open_closed_outputs()
    text_file = log.Queued if never_waits else open_text
    sys.stdout, sys.stderr = text_file(1), text_file(2)
    atexit.register(log.flush)  # for a script that ends by sys.exit, as argparse does
    sys.excepthook = explain_missing_package


def end_script(code):
    """End the process with this exit code; None is 0.

    At once, without joining threads or unloading TensorFlow: all files are already on disk.
    """
    drawn_on = getattr(sys.stdout, "rich_proxied_file", None)  # while rich draws a bar
    if drawn_on:
        print(SHOW_CURSOR, file=drawn_on, flush=True)
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


def open_text(fd):
    """A text file that prints a file name that is no UTF-8 (on Linux it is bytes) as \\udc.."""
    return open(fd, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)


def explain_missing_package(kind, error, trace):
    """A sys.excepthook: one sentence for a missing package, Python's own traceback for all else."""
    if kind is not ModuleNotFoundError:
        sys.__excepthook__(kind, error, trace)
        return
    log.fail(
        Path(sys.argv[0]).name,
        f"{sys.executable} has no package {error.name!r}: start it with .venv/bin/python, which "
        "`bash setup.sh` makes, or pip install -r requirements.txt",
    )


def new_parser(description, **settings):
    """An argparse parser whose --help keeps the lines of its description, and takes no short forms.

    A short form could mean another flag tomorrow, or of another script that is given the same ones.
    """
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **settings,
    )


def client_name(text):
    """An argparse type: a client's name, as the server's --clients lists it."""
    if not CLIENT_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r}: expected letters, digits, '.', '_', '-', at most 64"
        )
    return text


def initial_weights(text):
    """An argparse type: what a network begins with: none, imagenet, or a file that is there."""
    if text not in ("none", "imagenet") and not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is neither none nor imagenet, and no file here")
    return text


def new_file(text):
    """An argparse type: the pathlib.Path of a file to write.

    One that cannot be written is told now, and not after the work.
    """
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text} cannot be written: expected a file in a folder that exists"
        )
    return path


def at_least(least, most=999_999_999):
    """An argparse type: a whole number from `least` to `most`; the wire takes nine digits."""

    def whole_number(text):
        if not (text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of at least {least} and at most {most}"
            )
        return int(text)

    return whole_number


def number(expected, is_right):
    """An argparse type: a number for which is_right(number); `expected` says what that is."""

    def any_number(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_right(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return any_number


pixels = at_least(16, 4096)  # a side of an image
seconds = number("a number of seconds, 0 or more", lambda value: value >= 0)
positive = number("a number above 0", lambda value: value > 0)
fraction = number("a number from 0 to 1", lambda value: 0 <= value <= 1)


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

    def watch():
        while True:
            on_signal(os.read(reading, 1)[0])

    threading.Thread(target=watch, daemon=True).start()
