"""convert.py: the bounded process that reads files from outside, and whose fault it is.

The process is a real one here, since its bounds and its end are the point.
"""

import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT, Call, fail_with, processes_in, until
from hostile import many_names, one_text_many_times, replace_converter
from standin import SHAPES, random_tensors, write_weights

import todoClient
from common.files import sha256_of
from federation import convert, weights


@pytest.fixture
def layout(tmp_path):
    """Of the server's own file."""
    return weights.Layout(write_weights(tmp_path / "server_weight.h5", 0))


@pytest.fixture
def upload(tmp_path):
    """A file of another layout and with other names, with the numbers of seed 5."""
    shapes = [(f"model_2_{layer}", shape) for layer, shape in SHAPES]
    return write_weights(tmp_path / "upload.h5", 5, shapes, root="model_weights")


def check_converted(path, layout):
    digest = convert.convert(path, layout)
    expected = write_weights(path.with_name("expected.h5"), 5)
    assert path.read_bytes() == expected.read_bytes() and digest == sha256_of(expected)
    assert not list(path.parent.glob(".*"))


# --- what is converted ---------------------------------------------------------------------------


def test_another_layout_behind_a_user_block_becomes_the_servers(layout, upload, tmp_path):
    """HDF5 begins at byte 512: offsets in the file are not those of its bytes."""
    blocked = tmp_path / "blocked.h5"
    with h5py.File(upload) as plain, h5py.File(blocked, "w", userblock_size=512) as file:
        plain.copy("model_weights", file)
    check_converted(blocked, layout)


def test_what_is_wrong_with_the_file_is_a_refusal_and_the_file_stays(layout, tmp_path):
    tensors = random_tensors(5)
    tensors[1][0] = np.nan
    path = write_weights(tmp_path / "foreign.h5", tensors, root="model_weights")
    before = path.read_bytes()
    with pytest.raises(weights.NotFinite, match="norm1.*holds nan"):
        convert.convert(path, layout)
    assert path.read_bytes() == before and not list(tmp_path.glob(".*"))
    path.write_text("hello " * 999)
    with pytest.raises(ValueError, match="not a whole HDF5 weight file"):
        convert.convert(path, layout)


# --- whose fault it is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (many_names, "more than 10,000 tensors"),  # or the answer, too, would cost much here
        (one_text_many_times, "memory"),
    ],
)
def test_a_small_file_that_costs_much_is_refused_at_a_bounded_price(
    layout, tmp_path, monkeypatch, write, sentence
):
    """The bound on memory is one that such a file would go far beyond."""
    monkeypatch.setattr(convert, "MEMORY_BYTES", 64 << 20)
    write(tmp_path / "hostile.h5")
    with pytest.raises(ValueError, match=sentence):
        convert.convert(tmp_path / "hostile.h5", layout)


DIE = "os.kill(os.getpid(), signal.{})"
FOR_EVER = "weights.contents_of = lambda path: max(iter(int, 1))"
SAYS = "print({!r}); sys.exit()"


@pytest.mark.parametrize(
    ("code", "failure", "sentence"),
    [
        (FOR_EVER, ValueError, "cannot be read within"),
        ("weights.contents_of = lambda path: bytearray(300_000_000)", ValueError, "cannot be read"),
        (DIE.format("SIGSEGV"), ValueError, "crashed, twice"),
        (DIE.format("SIGKILL"), ChildProcessError, "exit code -9"),
        (DIE.format("SIGSTOP"), ChildProcessError, "stands still"),
        ("weights.contents_of = lambda path: os.listdir('/none')", ChildProcessError, "code 1"),
        # a hostile file may have taken the process over: what it says is not trusted either
        (SAYS.format(""), ValueError, "nonsense"),
        (SAYS.format("[" * 5000), ValueError, "nonsense"),
        (SAYS.format("null"), ValueError, "nonsense"),
        (SAYS.format('{"problem": null}'), ValueError, "nonsense"),
    ],
)
def test_whose_fault_it_is_that_a_file_is_not_read(
    layout, upload, tmp_path, monkeypatch, code, failure, sentence
):
    monkeypatch.setattr(convert, "WALL_S", 1 if "SIGSTOP" in code else 300)
    monkeypatch.setattr(convert, "CPU_S", 0)
    replace_converter(monkeypatch, tmp_path, code)
    before = upload.read_bytes()
    with pytest.raises(failure, match=sentence):
        convert.convert(upload, layout)
    assert upload.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_crash_is_tried_once_more(layout, upload, tmp_path, monkeypatch):
    once = f"if not os.path.exists('seen'): open('seen', 'w'); {DIE.format('SIGSEGV')}"
    replace_converter(monkeypatch, tmp_path, once)
    check_converted(upload, layout)


def test_a_process_that_cannot_be_started_is_our_fault(layout, upload, monkeypatch):
    error = BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(convert, "_start", fail_with(error))
    with pytest.raises(ChildProcessError, match="no process could be started .*temporarily"):
        convert.convert(upload, layout)


# --- bounds --------------------------------------------------------------------------------------


def test_two_run_at_once_and_a_conversion_that_nobody_waits_for_ends(
    layout, upload, tmp_path, monkeypatch
):
    """Two that run, and a third that waits for its place."""
    replace_converter(monkeypatch, tmp_path, "time.sleep(1000)")
    refused, acquire = [], convert.PLACES.acquire
    monkeypatch.setattr(
        convert.PLACES, "acquire", lambda timeout: acquire(timeout=0.1) or refused.append(1)
    )
    awaited, calls = [True, True, True], []
    for k in range(3):
        calls.append(Call(convert.convert, upload, layout, lambda k=k: awaited[k]))
        if k < 2:
            until(lambda k=k: len(processes_in(tmp_path)) == k + 1, "it has begun")
    until(lambda: refused, "the third waits")
    for k in (2, 1, 0):
        awaited[k] = False
        with pytest.raises(ChildProcessError, match="nobody waits"):
            calls[k].result()
        until(lambda k=k: len(processes_in(tmp_path)) == k, "its process is gone")
    assert not processes_in(tmp_path)


def bounded_converter(folder):
    """(process id, its limits by name) once it has bounded itself; None before."""
    for pid, line in processes_in(folder).items():
        if "federation.convert" in line:
            rows = open(f"/proc/{pid}/limits").read().splitlines()
            limits = {row[:26].strip(): row[26:].split()[0] for row in rows}
            if limits["Max file size"] != "unlimited":
                return pid, limits
    return None


def test_it_bounds_itself_before_it_opens_the_file_and_ends_with_its_parent(tmp_path):
    """The parent is killed, the process is even stopped: nothing is left."""
    os.mkfifo(tmp_path / "upload.h5")  # who opens it waits for ever: so the bounds came before
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from federation import convert
convert.contents_of({str(tmp_path / "upload.h5")!r})
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    try:
        pid, limits = until(lambda: bounded_converter(tmp_path), "it has bounded itself")
        assert limits["Max core file size"] == limits["Max file size"] == "0"
        assert 5 <= int(limits["Max cpu time"]) <= 9
        assert 268e6 < int(limits["Max address space"]) < 2e9
        os.kill(pid, signal.SIGSTOP)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not os.path.exists(f"/proc/{pid}"), "it ends")


# --- at a client ---------------------------------------------------------------------------------


def test_a_client_opens_nothing_that_was_fetched_with_hdf5(layout, upload, tmp_path, monkeypatch):
    """The first file goes through the process, a later one of the same layout needs none."""
    second = tmp_path / "second.h5"
    second.write_bytes(upload.read_bytes())
    other = write_weights(tmp_path / "other.h5", 3)
    monkeypatch.setattr(h5py, "File", None)
    of_first = todoClient.layout_of(upload, None)
    with monkeypatch.context() as no_process:
        no_process.setattr(convert, "_start", None)
        assert todoClient.layout_of(second, of_first) is of_first
    assert todoClient.layout_of(other, of_first).shapes == SHAPES
