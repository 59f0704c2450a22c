"""A round of this project and one of Flower, in turn: the same bytes, nobody trains.

    pip install -r flower_app/requirements.txt      # in an environment of its own
    python3 benchmarks/peers.py --clients 3 --megabytes 84.6

Both are real processes on this machine, in plaintext: todoServer and todoClients; a SuperLink and
SuperNodes with flower_app/. A round is from the beginning of a training until all clients have the
next round's weights. The last line is the median of the pairs, Flower's seconds over ours.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import flower
import round_overhead
import standin
from conftest import processes_in
from processes import cpu_seconds_with_children, write_indexes

LOOK_EVERY_S = 0.005
DEADLINE_S = 600  # for a round


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=84.6)
    parser.add_argument("--rounds", type=int, default=3, help="pairs that count (default: 3)")
    arguments = parser.parse_args(argv)
    if not flower.IS_INSTALLED:
        sys.exit(f"{sys.executable} has no flwr: pip install -r flower_app/requirements.txt")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "start.h5"
        standin.write_weights(weights, 0, standin.shapes_of_size(arguments.megabytes))
        theirs = FlowerSide(folder / "flower", arguments)
        try:
            ours = round_overhead.real_side(folder / "ours", weights, arguments)
            seconds, our_seconds, ratio = round_overhead.in_turn(theirs, ours, arguments.rounds)
        finally:
            theirs.system.stop()
    print(f"{arguments.clients} clients, {arguments.megabytes:g} MB, {arguments.rounds} pairs\n")
    print("| system | seconds a round | processor seconds a round | server peak, MB |")
    print("|---|---|---|---|")
    for who, each_s, cpu_s, peak in (
        ("ours", our_seconds, ours.cpu_s, ours.server_peak.peak),
        ("Flower", seconds, theirs.cpu_s, theirs.server_peak),
    ):
        print(f"| {who} | {each_s:.2f} | {cpu_s:.2f} | {peak / 1e6:.0f} |")
    print(f"\nratio_flower_to_ours {ratio:.1f}")


class FlowerSide:
    """What round_overhead.Side is for ours: its clients stand still between two rounds."""

    def __init__(self, folder, arguments):
        write_indexes(folder)
        self.folder = folder
        self.clients = arguments.clients
        self.round = 1
        self.cpu_s = None
        self.server_peak = 0
        names = [f"client{number + 1:03}" for number in range(arguments.clients)]
        for number in range(2, arguments.clients + 1):  # each has the index of the first
            (folder / "index" / f"worker{number}.pkl").symlink_to("worker1.pkl")
        modules = [ROOT / "benchmarks" / "untrained", ROOT / "tests"]
        self.system = flower.Flower(
            folder, names, modules, UNTRAINED_MEGABYTES=str(arguments.megabytes)
        )
        settings = {"num_clients": arguments.clients, "rounds": arguments.rounds + 2}
        self.run = threading.Thread(
            target=self.system.run, kwargs={"image_size": 16, **settings}, daemon=True
        )
        self.run.start()
        self.wait_for_clients()

    def wait_for_clients(self):
        """Until all stand before the training of this round."""
        until = time.monotonic() + DEADLINE_S
        while len(list(self.folder.glob(f"arrived-{self.round}-*"))) < self.clients:
            if time.monotonic() > until:
                sys.exit(f"benchmark: error: round {self.round}: {self.system.link.output}")
            time.sleep(LOOK_EVERY_S)

    def go(self):
        (self.folder / f"go-{self.round}").touch()
        self.round += 1

    def round_s(self):
        started = time.monotonic()
        self.go()
        self.wait_for_clients()
        seconds = time.monotonic() - started
        self.look_at_server()
        return seconds

    def look_at_server(self):
        for pid, line in processes_in(self.folder).items():
            if "flwr-serverapp" in line:
                status = Path(f"/proc/{pid}/status").read_text()
                self.server_peak = int(status.split("VmHWM:")[1].split()[0]) * 1024

    def total_cpu_s(self):
        return sum(cpu_seconds_with_children(pid) for pid in processes_in(self.folder))

    def finish(self):
        self.go()
        self.run.join(DEADLINE_S)


if __name__ == "__main__":
    main()
