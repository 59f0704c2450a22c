"""What a round costs besides training: real server and client processes that train nothing.

    python3 benchmarks/round_overhead.py --clients 3 --megabytes 84.6

Ours and the floor (benchmarks/bare.py) are measured in turn, round by round: all clients of one
side train, upload, are merged and download again, while the other side stands still. So what else
the machine does falls on both. `ratio_to_floor N` is the median of these pairs.
"""

import statistics
import subprocess
import sys
import tempfile
import time
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

BARE = Path(__file__).resolve().parent / "bare.py"


def main(argv=None):
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "start.h5"
        standin.write_weights(weights, 0, standin.shapes_of_size(arguments.megabytes))
        print(
            f"{arguments.clients} clients, {arguments.megabytes:g} MB, "
            f"medians of {arguments.rounds} rounds in turn\n"
        )
        print(
            "| form | seconds a round | the floor | processor seconds | the floor | server, MB "
            "| client, MB | ratio to the floor |"
        )
        print("|---|---|---|---|---|---|---|---|")
        ratios = {}
        for form in arguments.forms.split(","):
            floor = bare_side(folder / f"floor-{form}", weights, arguments)
            ours = real_side(folder / form, weights, arguments, form)
            seconds, floor_seconds, ratios[form] = in_turn(ours, floor, arguments.rounds)
            server, client = ours.memory()
            print(
                f"| {form} | {seconds:.2f} | {floor_seconds:.2f} | {ours.cpu_s:.2f} "
                f"| {floor.cpu_s:.2f} | {server / 1e6:.0f} | {client / 1e6:.0f} "
                f"| {ratios[form]:.2f} |",
                flush=True,
            )
        print("\nserver: peak above what it takes after the first download; client: above idle\n")
        for form, ratio in ratios.items():
            print(f"ratio_to_floor{'' if form == 'blob' else '_' + form} {ratio:.2f}")
        if arguments.tls:
            compare_tls(folder, weights, arguments)


def parse(argv):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--clients", type=int, default=3)
    add("--megabytes", type=float, default=84.6)
    add("--rounds", type=int, default=5, help="pairs that count; one more warms up (default: 5)")
    add("--forms", default="blob,base64", help="of the wire, to be measured (default: %(default)s)")
    add("--tls", action="store_true", help="blob under mutual TLS too, in turn with plaintext")
    return parser.parse_args(argv)


def in_turn(one, other, rounds):
    """Medians: seconds a round of one, of the other, and of one over the other pair by pair."""
    one.round_s()
    other.round_s()
    for side in (one, other):
        side.warmed_up_s = side.total_cpu_s()
    pairs = [(one.round_s(), other.round_s()) for _ in range(rounds)]
    for side in (one, other):
        side.cpu_s = (side.total_cpu_s() - side.warmed_up_s) / rounds
        side.finish()
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


class Side:
    """A server with its clients, which stand still between two rounds."""

    def __init__(self, server, clients):
        self.server = server
        self.clients = clients
        self.cpu_s = None  # a round, of all processes: what else the machine does counts less
        end_together([server, *clients])
        self.server_peak = Peak(server)
        self.client_peaks = [Peak(client) for client in clients]
        line_with(clients[0], "training now")  # the first download is over
        self.server_peak.mark()
        for client in clients[1:]:
            line_with(client, "training now")

    def round_s(self):
        """Seconds from the beginning of a training to the end of the next round's downloads."""
        started = time.monotonic()
        for client in self.clients:
            client.stdin.write("\n")
            client.stdin.flush()
        for client in self.clients:
            line_with(client, "training now")
        return time.monotonic() - started

    def total_cpu_s(self):
        return sum(cpu_seconds(process) for process in [self.server, *self.clients])

    def finish(self):
        """The last round; then all of them end."""
        for process in self.clients:
            process.stdin.write("\n")
            process.stdin.close()
        for process in (*self.clients, self.server):
            process.stdout.read()
        wait_for_all([self.server, *self.clients])

    def memory(self):
        """(bytes of the server above its level, bytes of the largest client above an idle one)."""
        server = self.server_peak.peak - self.server_peak.level
        return server, max(peak.peak for peak in self.client_peaks) - idle_client_bytes()


def idle_client_bytes():
    """What a client takes that has imported all it needs and done nothing."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import standin
sys.modules["model"] = standin
import todoClient
print(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024


def real_side(folder, weights, arguments, form="blob", certs=None):
    write_indexes(folder)
    names = [f"client{number + 1:03}" for number in range(arguments.clients)]
    environment = {"STANDIN_WEIGHTS": str(weights), "STANDIN_GATE": "1"}
    if form == "base64":
        environment["STANDIN_BASE64"] = "1"
    server_command = [STANDIN, "todoServer", "--listen", "localhost:0", "--image-size", "16"]
    server_command += ["--clients", ",".join(names), "--rounds", arguments.rounds + 2]
    server = start([*server_command, *tls_flags(certs, "server")], folder, **environment)
    address = line_with(server, r"listening on (\S+)")[1]
    clients = []
    for name in names:
        command = [STANDIN, "todoClient", "--name", name, "--server", address]
        command += ["--index", "index/worker1.pkl", *tls_flags(certs, name)]
        clients.append(start(command, folder, **environment))
    return Side(server, clients)


def tls_flags(certs, name):
    if certs is None:
        return []
    files = {"--tls-ca": "ca.pem", "--tls-cert": f"{name}.pem", "--tls-key": f"{name}.key"}
    return [part for flag, file in files.items() for part in (flag, certs / file)]


def bare_side(folder, weights, arguments):
    folder.mkdir()
    rounds = arguments.rounds + 2
    server = start([BARE, "server", weights, arguments.clients, rounds], folder)
    address = line_with(server, r"listening on (\S+)")[1]
    clients = [
        start([BARE, "client", address, rounds, f"client{number}"], folder)
        for number in range(arguments.clients)
    ]
    return Side(server, clients)


def make_certs(folder, clients):
    """The folder of a private CA, and of the certificates of a server on localhost and clients."""
    names = [f"client{number + 1:03}" for number in range(clients)]
    certs = folder / "certs"
    subprocess.run(
        [ROOT / "make_certs.sh", certs, "localhost", *names],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return certs


def compare_tls(folder, weights, arguments):
    """What encryption and certificates cost: mutual TLS in turn with plaintext."""
    certs = make_certs(folder, arguments.clients)
    tls = real_side(folder / "tls", weights, arguments, certs=certs)
    plain = real_side(folder / "plain", weights, arguments)
    tls_s, plain_s, ratio = in_turn(tls, plain, arguments.rounds)
    print(f"plaintext {plain_s:.2f} s, mutual TLS {tls_s:.2f} s a round")
    print(f"ratio_tls_to_plain {ratio:.2f}")


if __name__ == "__main__":
    main()
