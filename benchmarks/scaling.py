"""How the server's time and memory grow with the number of clients and the size of the model.

    python3 benchmarks/scaling.py                          # a table, up to 96 clients, up to 400 MB
    python3 benchmarks/scaling.py --clients 96 --megabytes 10
    python3 benchmarks/scaling.py --evaluate               # with TensorFlow and an evaluation

The server is the real one. The clients are the real client's code on threads of one process without
TensorFlow, and nobody trains. The server's seconds are processor time, so that the clients' work on
the same cores does not count. Its memory is the median of the last rounds' peaks, and its level is
what it takes after the first served download.
"""

import argparse
import csv
import os
import re
import statistics
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import standin
from processes import (
    STANDIN,
    Peak,
    cpu_seconds,
    end_together,
    line_with,
    start,
    wait_for_all,
    write_indexes,
)

from common.script import new_parser

ROUNDS = 5  # that count: the last ones of a run
GRID = [  # (clients, megabytes, rounds)
    (3, 10, ROUNDS),
    (6, 10, ROUNDS),
    (12, 10, ROUNDS),
    (24, 10, ROUNDS),
    (48, 10, ROUNDS),
    (96, 10, ROUNDS),
    (3, 1, ROUNDS),
    (3, 100, ROUNDS),
    (3, 400, 3),
    (3, 1, 100),
]


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--clients", type=int, help="one line of the table: so many clients ...")
    add("--megabytes", type=float, default=10, help="... of so large a model (default: 10)")
    add("--rounds", type=int, default=ROUNDS, help="... for so many rounds (default: %(default)s)")
    add("--evaluate", action="store_true", help="memory of the whole server, with TensorFlow")
    add("--peers", nargs=2, help=argparse.SUPPRESS)  # this script starts itself as the clients
    arguments = parser.parse_args(argv)
    if arguments.peers:
        address, clients = arguments.peers
        run_clients(address, int(clients))
    elif arguments.evaluate:
        measure_with_evaluation()
    elif arguments.clients:
        measure_without([(arguments.clients, arguments.megabytes, arguments.rounds)])
    else:
        measure_without(GRID)


def measure_without(grid):
    print(
        "| clients | MB | rounds | MB moved a round | seconds a round | server CPU seconds a round "
        "| for each GB moved | server peak, MB | above its level, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for clients, megabytes, rounds in grid:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            weights = folder / "start.h5"
            standin.write_weights(weights, 0, standin.shapes_of_size(megabytes))
            found = measure(folder, clients, rounds, weights, [STANDIN, "todoServer"])
        moved = 2 * clients * megabytes
        print(
            f"| {clients} | {megabytes:g} | {rounds} | {moved:g} | {found['seconds']:.2f} "
            f"| {found['cpu_seconds']:.2f} | {found['cpu_seconds'] / moved * 1000:.1f} "
            f"| {found['peak'] / 1e6:.1f} | {found['above_level'] / 1e6:.1f} |",
            flush=True,
        )


def measure_with_evaluation():
    print("| network | MB | clients | server peak, MB | above its level, MB |")
    print("|---|---|---|---|---|")
    for arch, image_size, rounds in [("drcnn", 128, ROUNDS), ("vgg16", 64, 2)]:
        for clients in (3, 48):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                weights = folder / "server" / "server_weight.h5"
                command = [ROOT / "todoServer.py", "--arch", arch]
                found = measure(folder, clients, rounds, weights, command, image_size)
                megabytes = weights.stat().st_size / 1e6
            print(
                f"| {arch}, {image_size} px | {megabytes:.1f} | {clients} "
                f"| {found['peak'] / 1e6:.0f} | {found['above_level'] / 1e6:.0f} |",
                flush=True,
            )


def measure(folder, clients, rounds, weights, command, image_size=16):
    """Medians of a run's last rounds: seconds, cpu_seconds, peak and above_level (bytes)."""
    write_indexes(folder)
    names = ",".join(f"client{number + 1:03}" for number in range(clients))
    environment = {"STANDIN_WEIGHTS": str(weights)}
    server = start(
        [
            *command,
            *("--listen", "localhost:0"),
            *("--clients", names),
            *("--image-size", image_size),
            *("--rounds", rounds + 1),
        ],
        folder,
        **environment,
    )
    memory = Peak(server)
    address = line_with(server, r"listening on (\S+)")[1]
    peers = start([__file__, "--peers", address, clients], folder, **environment)
    end_together([server, peers])
    threading.Thread(target=let_others_begin, args=[peers, memory], daemon=True).start()
    cpu, peaks = [], []
    for line in server.stdout:
        if re.search(r"round \d+/\d+: AUC", line):
            peaks.append(memory.restart())
            cpu.append(cpu_seconds(server))
    wait_for_all([server, peers])
    with open(folder / "server" / "history.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)][1:]
    peak = statistics.median(peaks[-min(rounds, ROUNDS) :])
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(b - a for a, b in zip(cpu, cpu[1:], strict=False)),
        "peak": peak,
        "above_level": peak - memory.level,
    }


def let_others_begin(peers, memory):
    """Marks the server's level once the first client has its weights; then the others begin."""
    for line in peers.stdout:
        if "training on" in line and memory.level is None:
            memory.mark()
            peers.stdin.close()


def run_clients(address, clients):
    """Real clients on threads of this process; all but the first begin when stdin ends."""
    sys.modules["model"] = standin
    import todoClient

    def take_part(name):
        try:
            Path(name).mkdir()
            flags = ["--name", name, "--server", address, "--index", "index/worker1.pkl"]
            todoClient.federate(todoClient.Site(todoClient.parse(flags)))
        except BaseException as error:  # or the others would wait for it
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    names = [f"client{number + 1:03}" for number in range(clients)]
    threads = [threading.Thread(target=take_part, args=[name]) for name in names]
    threads[0].start()
    sys.stdin.read()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
