"""Files that survive a crash: whole or not there, never half (standard library only).

Everything that a run writes for later goes through `publish`. A process killed at any instant leaves the old file
or the new one, and at most a temporary file beside it, which `clean` removes at the next start.
"""

import csv
import fcntl
import hashlib
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

STATE_VERSION = 1


def temporary(path):
    """A name in the folder of `path`, with its extension (Keras goes by it), for a file that `publish` will put in place."""
    path = Path(path)
    return path.with_name(f".{path.stem}.{os.getpid()}-{os.urandom(4).hex()}.tmp{path.suffix}")


def publish(written, path):
    """Puts the complete temporary file `written` in the place of `path`, durably: fsync, rename, fsync of the folder."""
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    os.replace(written, path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def replacing(path):
    """A temporary file to be written in the body; published as `path` after it, removed where anything goes wrong."""
    written = temporary(path)
    try:
        yield written
        publish(written, path)
    finally:
        written.unlink(missing_ok=True)


def publish_text(path, text):
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8", newline="")


def publish_rows(path, columns, rows):
    """A CSV file, whole from the state, so that a crash neither doubles nor drops a row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    )
    path = Path(path)
    if not path.exists() or path.read_bytes() != text.getvalue().encode():
        publish_text(path, text.getvalue())


def save_state(path, state):
    publish_text(path, json.dumps({"version": STATE_VERSION, **state}, indent=1) + "\n")


def load_state(path, required_keys=(), remedy="move it away"):
    """Return the state as a dict, or None where there is no such file.

    required_keys  names that the state must have
    remedy         what the user can do about a file that is no state of this program; the caller
                   knows it, because a server's user has other means than a client's

    Raises ValueError where the file is not a state of this version, or lacks a key.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version = state.pop("version")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is not a state file of this program ({error!r}): {remedy}"
        ) from None
    if version != STATE_VERSION:
        raise ValueError(
            f"{path} has version {version}, this program writes {STATE_VERSION}: finish the run "
            f"with the program that began it, or {remedy}"
        )
    missing = [key for key in required_keys if key not in state]
    if missing:
        raise ValueError(
            f"{path} is not a state file of this program (no {', '.join(missing)}): {remedy}"
        )
    return state


def sha256_of(path):
    """SHA-256 of a file as 64 hex digits; '' where it is missing."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


@contextmanager
def alone_in(folder):
    """Makes `folder` where it is missing; while the body runs, no other process is in it: a second server or client would
    clean away what the first is writing. The lock ends with its process, however that ends. Raises ValueError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(place)
        raise ValueError(
            f"another process works in {folder}: wait until it ends, or stop it, and start again"
        ) from None
    except OSError:
        pass  # a network's file system that has no locks
    try:
        yield
    finally:
        os.close(place)


def clean(folder):
    """Removes the temporary files that a killed process left in `folder`."""
    for left in Path(folder).glob(".*.tmp*"):
        left.unlink(missing_ok=True)


def move_aside(folder):
    """Moves what a server's run wrote into `folder`, and nothing else, into a folder old-1, old-2 ... there, the state first.
    Returns that, or None where there is nothing."""
    names = ("state.json", "server_weight.h5", "history.csv", "report.html")
    old = [Path(folder) / name for name in names if (Path(folder) / name).exists()]
    uploads = sorted(Path(folder).glob("*/client_weights.h5"))
    old += [
        path.parent for path in uploads if not (path.parent / "state.json").exists()
    ]  # that is a client's own folder
    if not old:
        return None
    number = 1
    while (Path(folder) / f"old-{number}").exists():
        number += 1
    aside = Path(folder) / f"old-{number}"
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    return aside
