"""A terminal with lines that scroll, and below them a block that is redrawn in place.

In a log, a pipe or a terminal that cannot move its cursor there are only the lines.
"""

import os
import shutil
import sys
import threading

from common import log

BAR_CELLS = 14


class Screen:
    """Lines, and below them one line for each name that has one."""

    def __init__(self):
        is_dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.redraws = sys.stdout.isatty() and not is_dumb
        self.block = {}  # name: its line
        self.num_drawn = 0  # lines of the block that are on the terminal now
        self.lock = threading.Lock()

    def print(self, line, to_stderr=False):
        """A line above the block."""
        with self.lock:
            if to_stderr and not sys.stderr.isatty():
                log.pass_on(line, to_stderr)
            else:
                log.pass_on(self._over_the_block([line]), to_stderr and not self.redraws)

    def update(self, name, line):
        """The line of `name` in the block; None takes it away."""
        if not self.redraws:
            return
        with self.lock:
            if line is None:
                self.block.pop(name, None)
            else:
                self.block[name] = line
            log.pass_on(self._over_the_block([]))

    def show(self, lines):
        """These lines in place of the whole block."""
        with self.lock:
            self.block = dict(enumerate(lines))
            log.pass_on(self._over_the_block([]))

    def close(self):
        """Takes the block away, for good."""
        with self.lock:
            self.block = {}
            if self.num_drawn:
                log.pass_on(self._over_the_block([]))
            self.redraws = False

    def _over_the_block(self, lines):
        """Text that replaces the block by these lines and the block.

        `pass_on` ends the last line.
        """
        erase = ""
        if self.num_drawn:
            erase = f"\x1b[{self.num_drawn}A\x1b[J"  # up, and erase from there to the end
        # A line that the terminal would break takes two rows, and the next `erase` one too few.
        columns = shutil.get_terminal_size().columns - 1
        block = [self.block[name][:columns] for name in sorted(self.block)]
        self.num_drawn = len(block)
        if not lines and not block:
            return erase + "\x1b[A"  # up once more: the end of the line goes down
        return erase + "\n".join([*lines, *block])


def bar(done, total):
    """[####----------]  29%"""
    share = min(1, done / max(1, total))
    filled = round(share * BAR_CELLS)
    return f"[{'#' * filled}{'-' * (BAR_CELLS - filled)}] {share:4.0%}"


def describe(name, report):
    """A client's line of what it reported by common.progress, within 80 columns.

    Raises KeyError, TypeError or ValueError where the report is not of that form.
    """
    words = [f"{name:<10}"]
    if "round" in report:
        words.append(f"round {report['round']:d}/{report['rounds']:d}")
    if report["phase"] == "training" and "step" in report:
        words.append(f"epoch {report['epoch']:d}/{report['epochs']:d}")
        words.append(bar(report["step"], report["steps"]))
        words.append(f"loss {report['loss']:.3f}")
    else:
        words.append(PHASES[report["phase"]])
    return "  ".join(words)


PHASES = {
    "loading": "loading images",
    "training": "training",
    "scoring": "scoring",
    "waiting": "waiting for the others",
}
