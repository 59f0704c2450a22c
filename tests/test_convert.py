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
from conftest import ROOT, Call, processes_in, until
from hostile import HOSTILE, replace_converter
from standin import SHAPES, random_tensors, write_weights

import todoClient
from common.files import sha256_of
from federation import convert, weights

SHAPES_1_MB = [("conv1", (3, 3, 3, 2)), ("dense", (250_000,)), ("healthy", (1,))]


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """Of the server's own file in tmp_path, where its processes are found too."""
    monkeypatch.chdir(tmp_path)
    return weights.Layout(write_weights(tmp_path / "server_weight.h5", 0))


@pytest.fixture
def upload(tmp_path):
    """A file of another layout, with the numbers of seed 5."""
    return write_weights(tmp_path / "upload.h5", 5, root="model_weights")


def running_in(folder):
    """The processes that `replace_converter` put in place of the real one."""
    return [pid for pid, line in processes_in(folder).items() if "converter_of_the_test" in line]


# --- what is converted ---------------------------------------------------------------------------


def below_model_weights(path):
    write_weights(path, 5, root="model_weights")


def with_other_names(path):
    write_weights(path, 5, [(f"model_2_{layer}", shape) for layer, shape in SHAPES])


def behind_a_user_block(path):
    """HDF5 begins at byte 512: offsets in the file are not those of its bytes."""
    write_weights(path, 5)
    with (
        h5py.File(path, "r") as plain,
        h5py.File(path.with_suffix(".u"), "w", userblock_size=512) as file,
    ):
        for name in plain:
            plain.copy(name, file)
        file.attrs["layer_names"] = plain.attrs["layer_names"]
    os.replace(path.with_suffix(".u"), path)


@pytest.mark.parametrize("write", [below_model_weights, with_other_names, behind_a_user_block])
def test_another_layout_becomes_the_servers(layout, tmp_path, write):
    path = tmp_path / "foreign.h5"
    write(path)
    digest = convert.convert(path, layout)
    assert path.read_bytes() == write_weights(tmp_path / "expected.h5", 5).read_bytes()
    assert digest == sha256_of(path)
    assert not list(tmp_path.glob(".*"))


def test_what_is_wrong_with_the_file_is_a_refusal_and_the_file_stays(layout, tmp_path):
    tensors = random_tensors(5)
    tensors[1][0] = np.nan
    path = write_weights(tmp_path / "foreign.h5", tensors, root="model_weights")
    before = path.read_bytes()
    with pytest.raises(weights.NotFinite, match="norm1.*holds nan"):
        convert.convert(path, layout)
    assert path.read_bytes() == before
    path.write_text("hello " * 999)
    with pytest.raises(ValueError, match="not a whole HDF5 weight file"):
        convert.convert(path, layout)
    assert not list(tmp_path.glob(".*"))


# --- whose fault it is ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_small_file_that_costs_much_is_refused_at_a_bounded_price(tmp_path, monkeypatch, kind):
    """The bound on memory is one that such a file would go far beyond."""
    monkeypatch.setattr(convert, "MEMORY_BYTES", 64 << 20)
    monkeypatch.setattr(convert, "CPU_S", 2)
    layout = weights.Layout(write_weights(tmp_path / "server_weight.h5", 0, SHAPES_1_MB))
    HOSTILE[kind](tmp_path / "upload.h5")
    assert (tmp_path / "upload.h5").stat().st_size < 1.1 * layout.size
    with pytest.raises(ValueError):
        convert.convert(tmp_path / "upload.h5", layout)


DIE = "os.kill(os.getpid(), signal.{})"
FOR_EVER = "weights.tensors_of = lambda path: [0 for _ in iter(int, 1)]"
SAYS = "json.load(sys.stdin); print({!r}); sys.exit()"


@pytest.mark.parametrize(
    ("code", "failure", "sentence"),
    [
        (FOR_EVER, ValueError, "cannot be read within"),
        ("weights.tensors_of = lambda path: bytearray(300_000_000)", ValueError, "cannot be read"),
        (DIE.format("SIGSEGV"), ValueError, "crashed, twice"),
        (DIE.format("SIGBUS"), ValueError, "crashed, twice"),
        (DIE.format("SIGABRT"), ValueError, "crashed, twice"),
        (DIE.format("SIGKILL"), ChildProcessError, "exit code -9"),
        (DIE.format("SIGTERM"), ChildProcessError, "exit code -15"),
        (DIE.format("SIGSTOP"), ChildProcessError, "stands still"),
        ("sys.exit(7)", ChildProcessError, "exit code 7"),
        ("raise MemoryError", ChildProcessError, "exit code 1"),
        ("weights.tensors_of = lambda path: os.listdir('/none')", ChildProcessError, "code 1"),
        # a hostile file may have taken the process over: what it says is not trusted either
        (SAYS.format(""), ValueError, "nonsense"),
        (SAYS.format("[" * 5000), ValueError, "nonsense"),
        (SAYS.format("null"), ValueError, "nonsense"),
        (SAYS.format('{"problem": null}'), ValueError, "nonsense"),
        (
            SAYS.format('{"layers": null, "problem": null, "tensors": [["conv1", null, 0, 0]]}'),
            ValueError,
            "nonsense",
        ),
        (
            SAYS.format('{"layers": null, "problem": null, "tensors": [[[], [], 0.5, "a"]]}'),
            ValueError,
            "1 tensors",
        ),
        (SAYS.format('{"layers": null, "problem": {"a": 1}, "tensors": []}'), ValueError, "a"),
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
    convert.convert(upload, layout)
    assert upload.read_bytes() == write_weights(tmp_path / "expected.h5", 5).read_bytes()


def test_a_process_that_cannot_be_started_is_our_fault(layout, upload, monkeypatch):
    def start():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(convert, "_start", start)
    with pytest.raises(ChildProcessError, match="no process could be started .*temporarily"):
        convert.convert(upload, layout)


# --- bounds --------------------------------------------------------------------------------------


def test_no_more_than_two_run_at_once(layout, tmp_path, monkeypatch):
    replace_converter(monkeypatch, tmp_path, "while not os.path.exists('go'): time.sleep(0.01)")
    most = []
    release = convert.PLACES.release
    monkeypatch.setattr(
        convert.PLACES, "release", lambda: (most.append(len(running_in(tmp_path))), release())
    )
    calls = [
        Call(convert.convert, write_weights(tmp_path / f"{k}.h5", k, root="model_weights"), layout)
        for k in range(4)
    ]
    until(lambda: len(running_in(tmp_path)) == convert.MOST_PROCESSES, "two processes run")
    (tmp_path / "go").touch()
    for call in calls:
        call.result()
    assert max(most) <= convert.MOST_PROCESSES == 2


def test_a_conversion_that_nobody_waits_for_ends(layout, tmp_path, monkeypatch):
    """Two that run, and a third that waits for its place."""
    replace_converter(monkeypatch, tmp_path, "time.sleep(1000)")
    awaited = [True]
    calls = [
        Call(
            convert.convert,
            write_weights(tmp_path / f"{k}.h5", k, root="model_weights"),
            layout,
            lambda: bool(awaited),
        )
        for k in range(3)
    ]
    until(lambda: len(running_in(tmp_path)) == 2, "two have begun")
    awaited.clear()
    for call in calls:
        with pytest.raises(ChildProcessError, match="nobody waits"):
            call.result(20)
    assert not running_in(tmp_path)


def bounded_converter(folder):
    """(process id, its limits by name) once it has bounded itself; None before."""
    for pid, line in processes_in(folder).items():
        if "federation.convert" in line:
            rows = open(f"/proc/{pid}/limits").read().splitlines()
            limits = {row[:26].strip(): row[26:].split()[0] for row in rows}
            if limits["Max file size"] != "unlimited":
                return pid, limits
    return None


@pytest.mark.parametrize("stopped", [False, True])
def test_it_bounds_itself_before_it_opens_the_file_and_ends_with_its_parent(tmp_path, stopped):
    """The parent is killed, the process may even be stopped: nothing is left."""
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
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
        parent.wait()
        until(lambda: not os.path.exists(f"/proc/{pid}"), "it ends", 10)
    finally:
        parent.kill()
        parent.wait()


# --- at a client ---------------------------------------------------------------------------------


def test_a_client_opens_nothing_that_was_fetched_with_hdf5(layout, tmp_path, monkeypatch):
    """The first file goes through the process, a later one of the same layout needs none."""
    first = write_weights(tmp_path / "first.h5", 1, root="model_weights")
    second = write_weights(tmp_path / "second.h5", 2, root="model_weights")
    other = write_weights(tmp_path / "other.h5", 3)
    monkeypatch.setattr(h5py, "File", None)
    of_first = todoClient.layout_of(first, None)
    assert of_first.shapes == SHAPES
    with monkeypatch.context() as no_process:
        no_process.setattr(convert, "_start", None)
        assert todoClient.layout_of(second, of_first) is of_first
    of_other = todoClient.layout_of(other, of_first)
    assert (of_other.shapes, of_other.size) == (SHAPES, other.stat().st_size)


def test_a_hostile_server_costs_a_client_a_sentence(tmp_path, monkeypatch):
    """What the sentence says was written by others: it is cut and escaped."""
    path = tmp_path / "fetched.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs["layer_names"] = np.array([b"\x1b[2J" + b"A" * 10_000])
    with pytest.raises(ValueError, match="the server's weights cannot be used") as caught:
        todoClient.layout_of(path, None)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
