"""Weight files that are small and cost much, and converters that fail.

A list of names in a file may repeat one name, and its entries may all refer to one text in the
file's heap: some kB are then hours of work for HDF5, or gigabytes.
"""

import subprocess
import sys

import h5py
import numpy as np
from conftest import ROOT

from federation import convert


def many_names(path, names=10_000):
    """22 kB: a list of 10,000 layers, each of which lists 10,000 weights."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.full(names, b"a")
        file.create_group("a").attrs["weight_names"] = np.full(names, b"w")
        file["a"]["w"] = np.zeros(1, "f4")


def one_text_many_times(path, megabytes=0.9, names=4000):
    """A list of 4,000 names that all refer to one text of 0.9 MB: read, they are 3.6 GB."""
    text = b"a" * int(megabytes * 1e6)
    with h5py.File(path, "w") as file:
        # each entry: length of the text (4 bytes), heap (8), number within the heap (4)
        file.attrs.create("layer_names", [text] + [b"?"] * (names - 1), dtype=h5py.string_dtype())
        file.create_group("a")
    content = bytearray(path.read_bytes())
    length = len(text).to_bytes(4, "little")
    entry = content.index(length)
    while content[entry + 16 : entry + 20] != (1).to_bytes(4, "little"):
        entry = content.index(length, entry + 1)
    first = bytes(content[entry : entry + 16])
    content[entry : entry + 16 * names] = first * names
    path.write_bytes(content)


def replace_converter(monkeypatch, folder, code):
    """The bounded process runs `code` before all else; its program lies in `folder`."""
    program = folder / "converter_of_the_test.py"
    program.write_text(
        f"""
import ctypes, json, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from federation import convert, weights
# or it would outlive a test run that is killed
ctypes.CDLL(None).prctl(convert.PR_SET_PDEATHSIG, signal.SIGKILL)
{code}
convert.main(*sys.argv[1:])
"""
    )

    def start(path, cpu_s, memory_bytes):
        return subprocess.Popen(
            [sys.executable, str(program), path, str(cpu_s), str(memory_bytes)],
            cwd=folder,  # where a test looks for it
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    monkeypatch.setattr(convert, "_start", start)
