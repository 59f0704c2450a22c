"""What lite0 learns from IDRiD's photographs, how long that takes, and how much memory.

    python3 benchmarks/photographs.py --source DIR                # seeds 0 to 4
    python3 benchmarks/photographs.py --source DIR --seeds 0 0    # twice the same: the same bits

DIR is what `--dataset idrid` takes. For each seed ./run_local.sh holds out a fifth, 101 of 507, and
three hospitals train together on the others, in a clone of this repository. Printed are the AUC of
the last round's model on all that is held out, and on the half of it that the page shows, which did
not choose the thresholds; the seconds of the whole command and of its processors; the peak memory
of the server, of each client, and of these four together, each at its own peak; and the SHA-256 of
the weights.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import data
import model
from common import files
from common.script import at_least, new_parser
from reporting import card as cards
from reporting import metrics

FLAGS = "--dataset idrid --arch lite0 --val-part 0.2 --no-alone --fresh".split()
LOOK_EVERY_S = 0.2
MEMBERS = ("server", "client001", "client002", "client003")


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--source", type=Path, required=True, metavar="DIR", help="IDRiD's folder")
    add("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2, 3, 4], help="(0 1 2 3 4)")
    add("--keep", type=Path, metavar="FOLDER", help="where to clone, and to leave")
    arguments = parser.parse_args(argv)
    source = arguments.source.resolve()
    model.configure(0)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        clone = arguments.keep or Path(temporary) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        os.chdir(clone)  # the paths in an index begin there
        areas = "any DR | referable | any DR, page | referable, page"
        memory = " | ".join(f"{name}, MB" for name in MEMBERS)
        print(f"| seed | {areas} | seconds | processor | {memory} | together, MB | weights |")
        print("|---" * (9 + len(MEMBERS)) + "|", flush=True)
        for seed in arguments.seeds:
            started, busy = time.monotonic(), processor_seconds()
            peaks = run(["--source", source, *FLAGS, "--seed", seed])
            seconds = [time.monotonic() - started, processor_seconds() - busy]
            areas = [*areas_of_all(), *areas_of_page()]
            rows.append(areas)
            memory = [f"{peaks[name] / 1e6:.0f}" for name in MEMBERS]
            together = f"{sum(peaks.values()) / 1e6:.0f}"
            cells = [
                str(seed),
                *words(areas),
                *[f"{each:.0f}" for each in seconds],
                *memory,
                together,
            ]
            digest = files.sha256_of("server/server_weight.h5")[:12]
            print(f"| {' | '.join(cells)} | {digest} |", flush=True)
    print(f"| mean | {' | '.join(words(np.mean(rows, axis=0)))} |")


def words(areas):
    return [f"{area:.3f}" for area in areas]


def processor_seconds():
    """Of all processes that this one has started, and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(flags):
    """Runs the command; its output goes to a file. Returns {"server": peak memory in bytes, ...}"""
    with open("benchmark.log", "ab") as log:
        command = ["./run_local.sh", *map(str, flags)]
        environment = {**os.environ, "PYTHON": sys.executable}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peaks = dict.fromkeys(MEMBERS, 0)
        while process.poll() is None:
            for name, peak in peaks_of_children(process.pid):
                peaks[name] = max(peaks[name], peak)
            time.sleep(LOOK_EVERY_S)
    if process.returncode:
        sys.exit(
            f"benchmark: error: ./run_local.sh ended with {process.returncode}, see {log.name}"
        )
    return peaks


def peaks_of_children(pid):
    """Yields (which of MEMBERS, its peak memory so far in bytes) for what the launcher runs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return
    for child in children:
        try:
            command = Path(f"/proc/{child}/cmdline").read_text()
            status = Path(f"/proc/{child}/status").read_text()
        except OSError:
            continue
        found = re.search(r"todo(Server)\.py|todoClient\.py\0--name\0(client\d+)", command)
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found and peak:
            yield found[2] or "server", int(peak[1]) * 1024


def areas_of_all():
    """The AUC of the last round's model on all held-out images, for each task."""
    card = cards.read("server/server_weight.h5")
    records = data.read_index("index/val_set.pkl")
    network = model.build(card["arch"], card["image_size"])
    model.load(network, "server/server_weight.h5")
    # the server has kept their features
    images = data.images_for(records, card["image_size"], "server", on_features=True)
    score = 1 - model.predict(network, images)
    grades = np.array([record["label"] for record in records])
    return [metrics.auc(score, grades >= least) for least in metrics.TASKS.values()]


def areas_of_page():
    """The AUC of the last round's model on the half that the page shows, for each task."""
    card = cards.read("server/server_weight.h5")
    return [card["tasks"][task]["measured"]["auc"][0] for task in metrics.TASKS]


if __name__ == "__main__":
    main()
