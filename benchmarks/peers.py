"""A round of this project and one of Flower, or of NVFlare, in turn: the same bytes, nobody trains.

    pip install -r flower_app/requirements.txt      # in an environment of its own
    python3 benchmarks/peers.py --clients 3 --megabytes 84.6
    python3 -m venv DIR && DIR/bin/pip install "nvflare>=2.9,<2.10" numpy
    python3 benchmarks/peers.py --nvflare DIR/bin/python      # NVFlare too

All are real processes on this machine: todoServer and todoClients beside each peer; a SuperLink and
SuperNodes with flower_app/, in plaintext; NVFlare's server and clients with nvflare_app/, under
mutual TLS, and then ours, too. A round is from the beginning of a training until all clients have
the next round's weights. The last lines are the medians of the pairs, the peer's seconds over ours.
"""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import flower
import round_overhead
import standin
from conftest import Started, free_port, processes_in
from processes import cpu_seconds_with_children, write_indexes

from common.script import new_parser

NVFLARE_WAITS_S = {  # between two looks of its server and two questions of its clients
    "NVFlare": (0.5, 2),  # its own
    "NVFlare-short-waits": (0.05, 0.05),
}
JOB = Path(__file__).resolve().parent / "nvflare_app" / "job.py"
LOOK_EVERY_S = 0.005
DEADLINE_S = 600  # for a round


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=84.6)
    parser.add_argument("--rounds", type=int, default=3, help="pairs that count (default: 3)")
    parser.add_argument(
        "--nvflare", metavar="PYTHON", type=Path, help="of NVFlare's environment: NVFlare too"
    )
    arguments = parser.parse_args(argv)
    if not flower.IS_INSTALLED and not arguments.nvflare:
        sys.exit(f"{sys.executable} has no flwr: pip install -r flower_app/requirements.txt")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "start.h5"
        standin.write_weights(weights, 0, standin.shapes_of_size(arguments.megabytes))
        print(
            f"{arguments.clients} clients, {arguments.megabytes:g} MB, {arguments.rounds} pairs\n"
        )
        print("| system | seconds a round | processor seconds a round | server peak, MB |")
        print("|---|---|---|---|")
        ratios = {}
        if flower.IS_INSTALLED:
            ratios["Flower"] = compare("Flower", FlowerSide, folder, weights, arguments)
        if arguments.nvflare:
            certs = round_overhead.make_certs(folder, arguments.clients)
            for name in NVFLARE_WAITS_S:
                ratios[name] = compare(name, NVFlareSide, folder, weights, arguments, certs)
    print()
    for peer, ratio in ratios.items():
        print(f"ratio_{peer.lower().replace('-', '_')}_to_ours {ratio:.1f}")


def compare(name, side, folder, weights, arguments, certs=None):
    """Prints a line of ours and one of the peer; returns the ratio."""
    theirs = side(name, folder / name, weights, arguments)
    try:
        theirs.wait_for_clients()
        ours = round_overhead.real_side(folder / f"beside-{name}", weights, arguments, certs=certs)
        seconds, our_seconds, ratio = round_overhead.in_turn(theirs, ours, arguments.rounds)
    finally:
        theirs.stop()
    tls = ", mutual TLS" if certs else ""
    for who, each_s, cpu_s, peak in (
        (f"ours{tls}", our_seconds, ours.cpu_s, ours.server_peak.peak),
        (f"{name}{tls}", seconds, theirs.cpu_s, theirs.server_peak),
    ):
        print(f"| {who} | {each_s:.2f} | {cpu_s:.2f} | {peak / 1e6:.0f} |", flush=True)
    return ratio


class Side:
    """What round_overhead.Side is for ours: its clients stand still between two rounds.

    Each says with a file arrived-ROUND-... that it has the round's weights, and waits for go-ROUND.
    """

    server = None  # in the command line of the process which averages

    def __init__(self, folder, arguments):
        self.folder = folder
        self.clients = arguments.clients
        self.round = 1
        self.cpu_s = None
        self.server_peak = 0

    def wait_for_clients(self):
        """Until all stand before the training of this round."""
        until = time.monotonic() + DEADLINE_S
        while len(list(self.folder.glob(f"arrived-{self.round}-*"))) < self.clients:
            if self.has_failed() or time.monotonic() > until:
                sys.exit(f"benchmark: error: round {self.round}: {self.output()}")
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
            if self.server in line:
                status = Path(f"/proc/{pid}/status").read_text()
                self.server_peak = int(status.split("VmHWM:")[1].split()[0]) * 1024

    def total_cpu_s(self):
        total = 0
        for pid in processes_in(self.folder):
            with contextlib.suppress(OSError):  # it ended meanwhile
                total += cpu_seconds_with_children(pid)
        return total


class FlowerSide(Side):
    server = "flwr-serverapp"

    def __init__(self, name, folder, weights, arguments):
        super().__init__(folder, arguments)
        write_indexes(folder)
        names = [f"client{number + 1:03}" for number in range(arguments.clients)]
        for number in range(2, arguments.clients + 1):  # each has the index of the first
            (folder / "index" / f"worker{number}.pkl").symlink_to("worker1.pkl")
        modules = [ROOT / "benchmarks" / "untrained", ROOT / "tests"]
        self.system = flower.Flower(
            folder, names, modules, UNTRAINED_MEGABYTES=str(arguments.megabytes)
        )
        self.printed = []
        self.run = threading.Thread(target=self.take_rounds, args=[arguments], daemon=True)
        self.run.start()

    def take_rounds(self, arguments):
        settings = {"num_clients": arguments.clients, "rounds": arguments.rounds + 2}
        self.printed.append(self.system.run(image_size=16, **settings))

    def has_failed(self):
        return not self.run.is_alive()

    def output(self):
        return "\n".join([self.system.link.output, *self.printed])

    def finish(self):
        self.go()
        self.run.join(DEADLINE_S)

    def stop(self):
        self.system.stop()


class NVFlareSide(Side):
    server = "server.runner_process"

    def __init__(self, name, folder, weights, arguments):
        super().__init__(folder, arguments)
        folder.mkdir()
        tensors = enumerate(standin.read_weights(weights))
        np.savez(folder / "start.npz", **{f"tensor{number:02}": each for number, each in tensors})
        python = arguments.nvflare.absolute()
        environment = {
            "NVFLARE_POC_WORKSPACE": str(folder / "poc"),
            "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
        }
        numbers = [arguments.clients, arguments.rounds + 2, free_port(), *NVFLARE_WAITS_S[name]]
        self.job = Started([python, JOB, folder, *map(str, numbers)], folder, environment)

    def has_failed(self):
        return self.job.process.poll() not in (None, 0)  # it ends when the run has begun

    def output(self):
        return self.job.output

    def finish(self):
        pass  # the last round need not be over for the end of it all

    def stop(self):
        """End all of it; a shell of each would start it again."""
        while processes := processes_in(self.folder):
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(LOOK_EVERY_S)


if __name__ == "__main__":
    main()
