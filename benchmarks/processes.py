"""What the benchmarks share: processes that they start, end together and measure; an index."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STANDIN = ROOT / "benchmarks" / "without_network.py"  # the real scripts without TensorFlow
LOOK_EVERY_S = 0.005


def start(command, cwd, **environment):
    """A Python process; its stdin and stdout are pipes, its stderr is the terminal's."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def end_together(processes):
    """Whoever fails ends the others, so that nobody waits for it; it has said why on stderr."""

    def watch(process):
        if process.wait() != 0:
            for other in processes:
                other.kill()

    for process in processes:
        threading.Thread(target=watch, args=[process], daemon=True).start()


def wait_for_all(processes):
    """Exits with a sentence where one of them failed."""
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"benchmark: error: the processes ended with {codes}, expected 0 of each")


def line_with(process, pattern):
    """The match of the next line of the process's output in which the pattern is found."""
    for line in process.stdout:
        found = re.search(pattern, line)
        if found:
            return found
    sys.exit(f"benchmark: error: {process.args[1]} ended before it said {pattern!r}")


class Peak:
    """The highest resident memory of a process, as the kernel counts it; in bytes."""

    def __init__(self, process):
        self.process = process
        self.level = None  # what was resident at `mark`
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        try:
            while self.process.poll() is None:
                self.peak = max(self.peak, self.now("VmHWM"))
                time.sleep(LOOK_EVERY_S)
        except (OSError, TypeError):
            pass  # the process ended between poll() and the look at it

    def now(self, line="VmRSS"):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{line}:\s+(\d+) kB", status)[1]) * 1024

    def mark(self):
        """From here on: how far above this level?"""
        self.restart()
        self.level = self.now()

    def restart(self):
        """Returns the peak so far; the next one begins at what is resident now."""
        peak = self.now("VmHWM")
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        self.peak = 0
        return peak


def cpu_seconds(process):
    """Processor time of a process so far, in the user's and the kernel's mode."""
    return sum(_cpu_ticks(process.pid)[:2]) / os.sysconf("SC_CLK_TCK")


def cpu_seconds_with_children(pid):
    """The same, with that of its children which have ended."""
    return sum(_cpu_ticks(pid)) / os.sysconf("SC_CLK_TCK")


def _cpu_ticks(pid):
    """utime, stime, cutime and cstime of proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()
    return [int(field) for field in fields[11:15]]


def write_indexes(folder):
    """Indexes of one image, which the stand-in loads but never looks at."""
    from PIL import Image

    import data

    (folder / "index").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "image.png")
    record = {"picture": "image.png", "label": 0, "dir": "image.png", "new_label": "True"}
    for name in ("val_set", "worker1"):
        data.write_index(folder / "index" / f"{name}.pkl", [record])
