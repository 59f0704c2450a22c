"""Weight files from outside: a process of its own finds out where their tensors lie.

A peer of 2020 and a user's own client may send any Keras weight file, and a client does not know
what a server sends. To read such a file takes HDF5, and a small hostile file can keep HDF5 busy for
minutes, make it take gigabytes, or crash it. So it is opened by a process that is started for this
one file, bounds itself before it opens anything, ends with its parent, and answers with nothing but
names, shapes, offsets and a digest of the layers. The numbers are then read as they lie in the
file.

Whose fault it is when that process does not succeed:

    it says what is wrong, or its own bounds on time or memory end it    the file's: ValueError
    it crashes (SIGSEGV, SIGBUS, SIGABRT), and a second one too          the file's: ValueError
    it is killed or stopped from outside, or cannot be started           ours: ChildProcessError

Ours is told a client as "try again": it must not give up its weights for a fault that is not its
own.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from federation import weights

ROOT = Path(__file__).resolve().parent.parent

MOST_PROCESSES = 2  # at the same time
CPU_S = 5  # and a second for each 20 MB of the file: processor time, from the imports on
WALL_S = 60  # and four times its processor time: longer only if it is stopped, or the machine is
MEMORY_BYTES = 256 << 20  # and twice the file, beside what the imports take
LOOK_EVERY_S = 0.25  # whether somebody still waits
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT}
PR_SET_PDEATHSIG = 1  # of Linux's prctl
TOO_EXPENSIVE = (
    "the file cannot be read within the time and the memory that a file of its size may take: "
    "send it as plain Keras weights, or write the numbers into the file that was fetched"
)

PLACES = threading.Semaphore(MOST_PROCESSES)


def convert(path, layout, is_awaited=lambda: True):
    """Replace the file `path` by one with the same numbers in this layout.

    Returns the SHA-256 of the new file. Raises as `contents_of`.
    """
    tensors, _ = contents_of(path, is_awaited)
    return weights.rewrite(path, tensors, layout)


def contents_of(path, is_awaited=lambda: True):
    """`weights.contents_of` a file from outside, which a process of its own reads.

    is_awaited  is_awaited() says whether anybody still waits for the result

    Raises ValueError, with a sentence for whoever sent it, where the file cannot be used, and
    ChildProcessError where that is not the file's fault.
    """
    while not PLACES.acquire(timeout=LOOK_EVERY_S):
        if not is_awaited():
            raise ChildProcessError("nobody waits for it any more")
    try:
        code, answer = _run(path, is_awaited)
        if -code in CRASHES:
            code, answer = _run(path, is_awaited)
    finally:
        PLACES.release()
    if -code in CRASHES:
        raise ValueError("not a whole HDF5 weight file (the library that reads it crashed, twice)")
    if code == -signal.SIGXCPU:
        raise ValueError(TOO_EXPENSIVE)
    if code != 0:
        raise ChildProcessError(f"the process that reads it ended with exit code {code}")
    try:
        answer = json.loads(answer)
        problem, layers = answer["problem"], answer["layers"]
        # where they lie is looked at by who uses them: weights.check_places
        tensors = [
            weights.Tensor(str(layer), tuple(shape), begin, end)
            for layer, shape, begin, end in answer["tensors"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"not a whole HDF5 weight file (who reads it answers nonsense: {str(error)[:80]})"
        ) from None
    if problem:
        raise ValueError(problem)
    return tensors, layers


def _run(path, is_awaited):
    """(exit code, what it said) of one process. Raises ChildProcessError."""
    size = os.path.getsize(path)
    cpu_s = CPU_S + size // 20_000_000
    try:
        process = _start(Path(path).absolute(), cpu_s, MEMORY_BYTES + 2 * size)
    except OSError as error:
        raise ChildProcessError(f"no process could be started for it: {error}") from None
    until = time.monotonic() + WALL_S + 4 * cpu_s
    try:
        while time.monotonic() < until:
            try:
                answer, _ = process.communicate(timeout=LOOK_EVERY_S)
                return process.returncode, answer
            except subprocess.TimeoutExpired:
                if not is_awaited():
                    raise ChildProcessError("nobody waits for it any more") from None
        # its processor time would have ended it long before
        raise ChildProcessError("the process that reads it stands still")
    finally:
        process.kill()
        process.wait()


def _start(path, cpu_s, memory_bytes):
    return subprocess.Popen(
        # -P: no module is imported from the folder that the script was started in
        [sys.executable, "-P", "-m", "federation.convert", path, str(cpu_s), str(memory_bytes)],
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # one thread: NumPy's others would only take address space
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C in a terminal is for its parent
    )


# --- the process --------------------------------------------------------------------------------


def main(path, cpu_s, memory_bytes):
    """Prints, as JSON, where the tensors of a file lie, or a sentence that says what is wrong."""
    set_bounds(int(cpu_s), int(memory_bytes))
    tensors, layers, problem = [], None, None
    try:
        tensors, layers = weights.contents_of(path)
    except ValueError as error:
        problem = str(error)
    except MemoryError:
        problem = TOO_EXPENSIVE
    print(json.dumps({"tensors": tensors, "layers": layers, "problem": problem}))


def set_bounds(cpu_s, memory_bytes):
    """What the kernel keeps, because HDF5 does not come back to us while it is busy."""
    # It ends with the thread that started it, and that one waits for it as long as its process is.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    used = resource.getrusage(resource.RUSAGE_SELF)
    until_s = int(used.ru_utime + used.ru_stime) + 1 + cpu_s
    # SIGXCPU comes at the soft limit; SIGKILL at the hard one, should the first not end it
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (until_s, until_s + 1))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    address_space = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file


if __name__ == "__main__":
    main(*sys.argv[1:])
