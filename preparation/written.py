"""What prepare.py wrote into a folder, so that it removes that and nothing else.

The folder's written.jsonl has a line for each file: its name, size and time, and what it was made
from. The line is written before the file is put in place, so after a crash at any instant no file
of ours is unknown. A file of the same name with another size or time is the user's, and is moved to
a folder old-1, old-2 ... instead of being removed or written over.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

from common.files import clean, first_free, publish, publish_text, temporary
from preparation.tables import few

LIST = "written.jsonl"


class WrittenFiles:
    """The files in one folder that prepare.py wrote. Only one process may have it open."""

    def __init__(self, folder, read_only=False):
        """Makes the folder where it is missing, and tidies up after a crash; not if read_only."""
        self.folder = Path(folder)
        self.old = None  # where this run moves what is not ours
        self.moved = []
        self.entries = {}  # name -> list of what was written under it, the latest last
        self.load()
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder)
            self.shorten_list()

    def load(self):
        """Read the list; a line that a crash cut off is left out."""
        try:
            lines = (self.folder / LIST).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
                self.entries.setdefault(entry["name"], []).append(entry)
            except (ValueError, KeyError, TypeError):
                continue

    def shorten_list(self):
        """Write the list anew, with the files that are there only."""
        path = self.folder / LIST
        if not self.entries and path.exists() and path.stat().st_size > 0:
            self.clear(path)  # a file of the user's that has this name
        current = {name: self.entry(self.folder / name) for name in self.entries}
        self.entries = {name: [entry] for name, entry in current.items() if entry}
        lines = [json.dumps(entry) + "\n" for entries in self.entries.values() for entry in entries]
        publish_text(path, "".join(lines))

    def entry(self, path):
        """What the list says of the file at `path`, a dict, if we wrote that file; else None."""
        try:
            found = os.lstat(path)
        except OSError:
            return None
        for entry in self.entries.get(Path(path).name, ()):
            if (entry.get("size"), entry.get("mtime_ns")) == (found.st_size, found.st_mtime_ns):
                return entry
        return None

    def clear(self, path):
        """Make room for a file at `path`: remove ours, move any other aside."""
        path = Path(path)
        if not os.path.lexists(path):
            return
        if self.entry(path):
            path.unlink()
            return
        if self.old is None:
            self.old = first_free(self.folder, "old-{}")
            self.old.mkdir()
        path.rename(self.old / path.name)
        self.moved.append(path.name)

    def add(self, entry):
        """Know of a file that `publish_listed` listed, perhaps in another process."""
        self.entries.setdefault(entry["name"], []).append(entry)

    def tell_moved(self):
        """Say what was moved aside, if anything was."""
        if self.moved:
            print(
                f"{self.old}: {len(self.moved)} files that prepare.py did not write were moved "
                f"here: {few(self.moved)}"
            )

    @contextmanager
    def publishing(self, path, **facts):
        """A temporary file to be written in the body; then it is listed and published as `path`.

        facts: what else the list says of it. A body that writes nothing publishes nothing.
        """
        written = temporary(path)
        try:
            yield written
            if written.exists():
                self.clear(path)
                self.add(publish_listed(written, path, facts))
        finally:
            written.unlink(missing_ok=True)


def publish_listed(written, path, facts):
    """List the complete temporary file `written`, then put it in place. Returns its entry."""
    path = Path(path)
    found = os.stat(written)
    entry = {
        "name": path.name,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        **facts,
    }
    # One short write to the end of the list: several processes may do so at once.
    target = os.open(path.parent / LIST, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(target, (json.dumps(entry) + "\n").encode())
    finally:
        os.close(target)
    publish(written, path)
    return entry
