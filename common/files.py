"""Files that survive a crash: each is whole or not there, never half. Standard library only.

Everything that a run keeps for later goes through `publish`. A process that is killed at any
instant leaves the old file or the new one, and at most a temporary file beside it; `clean` removes
that at the next start.
"""

import csv
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

from common import log

STATE_VERSION = 3
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit of this process
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)  # that are open: of this process, of this machine


# --- publishing ----------------------------------------------------------------------------------


def temporary(path):
    """Return a new name beside `path`, for a file that `publish` will rename to it.

    It keeps the extension, because Keras chooses the file format by it.
    """
    path = Path(path)
    return path.with_name(f".{path.stem}.{os.getpid()}-{os.urandom(4).hex()}.tmp{path.suffix}")


def publish(written, path):
    """Rename the complete temporary file `written` to `path`, durably."""
    # The content must be on disk before the name points to it ...
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    os.replace(written, path)
    # ... and the new name is on disk only once the folder is.
    _flush_folder(Path(path).parent)


def _flush_folder(folder):
    folder_fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_fd)
    except OSError as error:
        # Some network file systems cannot do that to a folder, and need it less: the new name is
        # at their server already. A disk's own error (EIO, ENOSPC) is another matter.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        _warn_once(
            f"this file system cannot flush folders ({error.strerror}): after a power cut, a file "
            "may be the one of a moment before"
        )
    finally:
        os.close(folder_fd)


@functools.cache
def _warn_once(sentence):
    """Say it the first time only; the cache is the memory."""
    log.say("files", f"warning: {sentence}")


@contextmanager
def replacing(path):
    """Give the body a temporary file to write; afterwards publish it as `path`.

    If the body or the publishing fails, the temporary file is removed and `path` is as it was.
    """
    written = temporary(path)
    try:
        with naming(path):
            yield written
            publish(written, path)
    finally:
        written.unlink(missing_ok=True)


@contextmanager
def naming(path):
    """Name `path` in what a full disk raises in the body, which names no file by itself."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)
        raise


def publish_text(path, text):
    """Publish `text` as UTF-8, its line ends as they are."""
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8", newline="")


def publish_rows(path, columns, rows):
    """Publish a CSV file with these columns; a row is a dict, and its other keys are left out.

    The file is written whole and never appended to, so a crash neither doubles nor drops a row. A
    file that is already the same stays untouched.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _rounded(value) for name, value in row.items()})
    # compared as bytes: a spreadsheet may have saved the file in an encoding that is not UTF-8
    if not path.exists() or path.read_bytes() != text.getvalue().encode():
        publish_text(path, text.getvalue())


def _rounded(value):
    return round(value, 6) if isinstance(value, float) else value


# --- the state -----------------------------------------------------------------------------------


def save_state(path, state):
    """Publish `state`, a dict of JSON values, with this program's version of the format."""
    publish_text(path, json.dumps({"version": STATE_VERSION, **state}, indent=1) + "\n")


def load_state(path, kinds, remedy):
    """Return the state as a dict, or None where there is no such file.

    kinds   {name: type} of what the state must have, all of it and nothing else; a type may be a
            union, as `list | None`
    remedy  what the user can do about a file that is no state of this program; the caller knows
            it, because a server's user has other means than a client's

    Raises ValueError where the file is not a state of this version, or says what it cannot.
    """
    if not path.exists():
        return None
    if not path.is_file():  # reading a FIFO waits for ever
        raise ValueError(f"{path} is not a file: {remedy}")
    try:
        state = json.loads(path.read_bytes())
        version = state.pop("version")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a state file of this program ({str(error)[:80]}): {remedy}"
        ) from None
    if version != STATE_VERSION:
        raise ValueError(
            f"{path} has version {str(version)[:20]}, this program writes {STATE_VERSION}: finish "
            f"the run with the program that began it, or {remedy}"
        )
    wrong = []
    for name in {*state, *kinds}:
        value = state.get(name, ...)
        kind = kinds.get(name, ())
        # to Python, a bool is an int
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"{path} is not a state file of this program (look at "
            f"{', '.join(sorted(wrong))[:200]}): {remedy}"
        )
    return state


def sha256_of(path):
    """Return the SHA-256 of a file as 64 hex digits, '' where there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


# --- a run's folder ------------------------------------------------------------------------------


@contextmanager
def alone_in(folder):
    """Make `folder` where it is missing, and hold it for this process while the body runs.

    A second server or client in the same folder would remove the temporary files that the first is
    writing. The lock belongs to the open folder, so the operating system releases it however the
    process ends. A folder that was made here, and in which nothing was kept, is removed again.
    Raises ValueError where another process holds the folder, OSError where this one cannot write
    into it: told now, and not at the first upload.
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{folder} is a file, expected a folder") from None
    folder_fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder_of(folder_fd)
        os.close(folder_fd)
        raise ValueError(
            f"another process works in {folder}: wait until it ends, or stop it{holder}, and start "
            "again"
        ) from None
    except OSError as error:
        # Some network file systems have no locks. Better a run without one than none.
        _warn_once(
            f"this file system has no locks ({error.strerror}): make sure yourself that no two "
            "processes work in one folder"
        )
    try:
        writable = temporary(folder / "writable")
        writable.touch()
        writable.unlink()
        yield
    finally:
        with suppress(OSError):  # one that is not empty stays
            for each in made:
                each.rmdir()
        os.close(folder_fd)


def _holder_of(folder_fd):
    """' (process 4711)', who holds the lock of a folder; '' where this machine does not say.

    A line of /proc/locks: `1: FLOCK  ADVISORY  WRITE 4711 fe:01:2883 0 EOF`, the device in
    hexadecimal. The file's number is enough: a device as `stat` has it may be another one there.
    """
    inode = os.fstat(folder_fd).st_ino
    try:
        locks = Path("/proc/locks").read_text()
    except OSError:
        return ""
    found = re.search(rf"FLOCK .* (\d+) [0-9a-f]+:[0-9a-f]+:{inode} ", locks)
    return f" (process {found[1]})" if found else ""


def clean(folder):
    """Remove the temporary files that a killed process left in `folder`.

    Only names that `temporary` makes: a file like .notes.tmp is the user's.
    """
    for left_over in folder.glob(".*.tmp*"):
        if re.fullmatch(r"\..*\.\d+-[0-9a-f]{8}\.tmp(\.\w+)?", left_over.name):
            left_over.unlink(missing_ok=True)


def first_free(folder, pattern):
    """The first path in `folder` that is not taken: of pattern.format(1), pattern.format(2) ..."""
    number = 1
    while (folder / pattern.format(number)).exists():
        number += 1
    return folder / pattern.format(number)


def move_aside(folder, paths):
    """Move these files and folders, as far as they are there, to a new folder old-N in `folder`.

    Returns the new folder (pathlib.Path), or None where there was nothing to move.
    """
    old_files = [path for path in paths if path.exists()]
    if not old_files:
        return None
    aside = first_free(folder, "old-{}")
    aside.mkdir()
    for path in old_files:
        path.rename(aside / path.name)
    return aside
