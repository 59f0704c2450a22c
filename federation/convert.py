"""Weight files of another layout, brought into the server's layout by a process of their own.

A peer of 2020 and a user's own client may send any Keras weight file. To read it takes HDF5, and a
small hostile file can keep HDF5 busy for minutes, make it take gigabytes, or crash it. So such a
file is opened by a process that is started for this one file, bounds itself before it opens
anything, and ends with the server. `Converters` starts it; `main` is what it runs.

Whose fault it is when that process does not succeed:

    it says what is wrong, or its own bounds on time or memory end it    the file's: ValueError
    it crashes (SIGSEGV, SIGBUS, SIGABRT), and a second one too          the file's: ValueError
    it is killed or stopped from outside, or cannot be started           ours: ChildProcessError

Ours is told the client as "try again": a client must not give up its weights for a fault that is
not its own.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.files import temporary
from federation import weights

ROOT = Path(__file__).resolve().parent.parent

MOST_PROCESSES = 2  # conversions at the same time; one a client
CPU_S = 5  # and a second for each 20 MB of the model: processor time, from the imports on
WALL_S = 60  # and four times its processor time: longer only if it is stopped, or the machine is
MEMORY_BYTES = 256 << 20  # and twice the model, beside what the imports take
MOST_CHARACTERS = 2000  # of a sentence: a name that it quotes may be of any length
LOOK_EVERY_S = 0.25  # whether the client still waits
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT}
PR_SET_PDEATHSIG = 1  # of Linux's prctl

# The kernel ends the process when the *thread* that started it ends, and gRPC's threads come and
# go. So all are started by this one, which lasts as long as the server.
STARTER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starts-converters")


class Converters:
    """Converts uploads, at most one of a client and MOST_PROCESSES in all at the same time."""

    def __init__(self, layout):
        self.layout = layout
        self.cpu_s = CPU_S + layout.size // 20_000_000
        self.memory_bytes = MEMORY_BYTES + 2 * layout.size
        self.busy = set()  # clients whose files are being converted
        self.changed = threading.Condition()

    def convert(self, client, path, is_awaited=lambda: True):
        """Replace the file `path` by one with the same numbers in the server's layout.

        is_awaited: is_awaited() says whether anybody still waits for the result.

        Returns the SHA-256 of the new file. Raises ValueError, with a sentence for the client,
        where the file cannot be used, and ChildProcessError where that is not the file's fault.
        """
        with self.changed:
            while client in self.busy or len(self.busy) >= MOST_PROCESSES:
                if not is_awaited():
                    raise ChildProcessError("nobody waits for it any more")
                self.changed.wait(LOOK_EVERY_S)
            self.busy.add(client)
        converted = temporary(path)
        try:
            self._write_outside(converted)
            self._run_until_it_ends_well(path, converted, is_awaited)
            # The process has opened a hostile file: what it wrote is not trusted either.
            digest, fits = weights.inspect(converted, self.layout)
            if not fits:
                raise ChildProcessError("the converter wrote a file of another layout")
            os.replace(converted, path)
            return digest
        finally:
            converted.unlink(missing_ok=True)
            with self.changed:
                self.busy.discard(client)
                self.changed.notify_all()

    def _write_outside(self, path):
        """The server's file without its numbers, which the process fills in."""
        with open(path, "wb") as file:
            for begin, content in self.layout.outside:
                file.seek(begin)
                file.write(content)

    def _run_until_it_ends_well(self, path, converted, is_awaited):
        for attempt in (1, 2):
            code, answer = self._run(path, converted, is_awaited)
            crashed = code < 0 and -code in CRASHES
            if not crashed or attempt == 2:
                break
        if code == 0:
            sentence = json.loads(answer)
            if sentence:
                raise ValueError(sentence)
        elif crashed:
            raise ValueError(
                "not a whole HDF5 weight file (the library that reads it crashed, twice)"
            )
        elif code == -signal.SIGXCPU:
            raise ValueError(too_expensive(self.cpu_s, self.memory_bytes))
        elif code < 0:
            name = signal.Signals(-code).name
            raise ChildProcessError(f"the process that converts it was ended by {name}")
        else:
            raise ChildProcessError(f"the process that converts it failed with exit code {code}")

    def _run(self, path, converted, is_awaited):
        """(exit code, what it said) of one process. Raises ChildProcessError."""
        task = {
            "path": str(path),
            "converted": str(converted),
            "tensors": self.layout.tensors,
            "cpu_s": self.cpu_s,
            "memory_bytes": self.memory_bytes,
            "file_bytes": int(1.1 * self.layout.size),
            "server": os.getpid(),
        }
        try:
            process = STARTER.submit(start).result()
        except OSError as error:
            raise ChildProcessError(f"no process could be started for it: {error}") from None
        unsent = json.dumps(task)
        until = time.monotonic() + WALL_S + 4 * self.cpu_s
        try:
            while time.monotonic() < until:
                try:
                    answer, _ = process.communicate(unsent, timeout=LOOK_EVERY_S)
                    return process.returncode, answer
                except subprocess.TimeoutExpired:
                    unsent = None  # communicate() goes on where it was
                if not is_awaited():
                    raise ChildProcessError("nobody waits for it any more")
            # its processor time would have ended it long before
            raise ChildProcessError("the process that converts it stands still")
        finally:
            process.kill()
            process.wait()


def start():
    return subprocess.Popen(
        # -P: no module is imported from the folder that the server was started in
        [sys.executable, "-P", "-m", "federation.convert"],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # one thread: NumPy's others would only take address space
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C in a terminal is for the server
    )


def too_expensive(cpu_s, memory_bytes):
    return (
        f"the file cannot be read within {cpu_s} s and {memory_bytes // 1_000_000} MB: send it as "
        "plain Keras weights, or write the numbers into the file that was fetched"
    )


# --- the process --------------------------------------------------------------------------------


def main():
    """The task as JSON on stdin; on stdout null, or a sentence that says what is wrong."""
    task = json.load(sys.stdin)
    end_with(task["server"])
    set_bounds(task["cpu_s"], task["memory_bytes"], task["file_bytes"])
    tensors = [weights.Tensor(*tensor) for tensor in task["tensors"]]
    sentence = convert(task, tensors)
    print(json.dumps(sentence and sentence[:MOST_CHARACTERS]))


def convert(task, tensors):
    """What is wrong with the file; None once its numbers lie in the converted one."""
    expected = [(tensor.layer, tensor.shape) for tensor in tensors]
    try:
        offsets = weights.check(task["path"], expected)
    except ValueError as error:
        return str(error)
    except MemoryError:
        return too_expensive(task["cpu_s"], task["memory_bytes"])
    # From here on what fails is not the file's fault: a disk that is full, for example.
    with open(task["path"], "rb") as source, open(task["converted"], "r+b") as target:
        for tensor, offset in zip(tensors, offsets, strict=True):
            source.seek(offset)
            target.seek(tensor.begin)
            for first in range(tensor.begin, tensor.end, weights.BLOB_BYTES):
                target.write(source.read(min(weights.BLOB_BYTES, tensor.end - first)))
    return None


def end_with(server):
    """Ask the kernel for SIGKILL when the server ends, however it ends and whatever we do then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it ended before that
        os._exit(1)


def set_bounds(cpu_s, memory_bytes, file_bytes):
    """Limits that the kernel keeps, because HDF5 does not come back to us while it is busy."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until_s = int(used.ru_utime + used.ru_stime) + 1 + cpu_s
    # SIGXCPU comes at the soft limit; SIGKILL at the hard one, should the first not end it
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (until_s, until_s + 1))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    address_space = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


if __name__ == "__main__":
    main()
