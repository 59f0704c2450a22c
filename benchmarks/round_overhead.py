"""What a round costs besides training: real server and client processes, no training, no evaluation.

    python3 benchmarks/round_overhead.py --clients 3 --megabytes 84.6

The floor, in the same run and in turn with ours: the same bytes through bare gRPC in 1 MiB pieces, clients that read the
tensors with h5py, add a constant and write the file, a NumPy float64 average, one file written; all files fsynced; no
checks, no hashes, no state. The last line is `ratio_to_floor N`, the median of ours over the median of the floor.
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

import standin


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=84.6)
    parser.add_argument(
        "--rounds", type=int, default=5, help="that count; one more warms up (default: 5)"
    )
    parser.add_argument(
        "--forms", default="blob,base64", help="of the wire, to be measured (default: %(default)s)"
    )
    parser.add_argument(
        "--tls", action="store_true", help="blob under mutual TLS too, in turn with plaintext"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.h5"
        standin.make_weights(start, arguments.megabytes)
        results = {"floor": bare_rounds(Path(folder) / "floor", start, arguments)}
        for form in arguments.forms.split(","):
            results[form] = real_rounds(Path(folder) / form, start, arguments, form)
        report(results, arguments)
        if arguments.tls:
            tls_to_plain(Path(folder), start, arguments)


def tls_to_plain(folder, start, arguments):
    """In turn, three times each: what encryption and certificates cost."""
    names = [f"client{number + 1:03}" for number in range(arguments.clients)]
    made = [HERE.parent / "make_certs.sh", folder / "certs", "localhost", *names]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    seconds = {"plain": [], "tls": []}
    for turn in range(3):
        for form in seconds:
            result = real_rounds(
                folder / f"{form}{turn}",
                start,
                arguments,
                certs=folder / "certs" if form == "tls" else None,
            )
            seconds[form].extend(result["seconds"])
    plain, tls = (statistics.median(seconds[form]) for form in ("plain", "tls"))
    print(
        f"plaintext {plain:.2f} s, mutual TLS {tls:.2f} s a round\nratio_tls_to_plain {tls / plain:.2f}"
    )


class Peak:
    """The highest resident memory of a process, as the kernel counts it, looked at until the process ends; in bytes."""

    def __init__(self, process):
        self.process, self.level, self.peak = process, None, 0
        threading.Thread(target=self.look, daemon=True).start()

    def look(self):
        try:
            while self.process.poll() is None:
                self.peak = max(self.peak, self.now("VmHWM"))
                time.sleep(0.005)
        except (OSError, TypeError):
            pass  # it ended between two looks

    def now(self, line="VmRSS"):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{line}:\s+(\d+) kB", status)[1]) * 1024

    def mark(self):
        """From here on, how far above this level?"""
        self.begin_again()
        self.level = self.now()

    def begin_again(self):
        """The peak so far; the next begins at what is resident now."""
        peak = self.now("VmHWM")
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        self.peak = 0
        return peak


def start(command, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def together(*processes):
    """Whoever fails ends the others too, so that nobody waits for it; it has said why on stderr."""

    def look(process):
        if process.wait() != 0:
            for other in processes:
                other.kill()

    for process in processes:
        threading.Thread(target=look, args=[process], daemon=True).start()


def all_ended(*processes):
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(
            f"benchmark: error: the processes ended with {codes}, expected 0 of each; see above"
        )


def index_of_one(folder):
    """An index whose one image is never looked at by the stand-in, but is loaded."""
    from PIL import Image

    import data

    (folder / "index").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "image.png")
    record = {"picture": "image.png", "label": 0, "dir": "image.png", "new_label": "True"}
    for name in ("val_set", "worker1"):
        data.write_index(folder / "index" / f"{name}.pkl", [record])


def tls_flags(certs, name):
    files = {"--tls-ca": "ca.pem", "--tls-cert": f"{name}.pem", "--tls-key": f"{name}.key"}
    return [each for flag, file in files.items() for each in (flag, certs / file)] if certs else []


def real_rounds(folder, weights, arguments, form="blob", certs=None):
    """{"seconds": of each counted round, "server": bytes above the level after the first download, "client": above idle}"""
    index_of_one(folder)
    names = [f"client{number + 1:03}" for number in range(arguments.clients)]
    environment = {
        "BENCHMARK_WEIGHTS": str(weights),
        "BENCHMARK_BASE64": str(int(form == "base64")),
    }
    server = start(
        [
            HERE / "standin.py",
            "todoServer",
            "--listen",
            "localhost:0",
            "--clients",
            ",".join(names),
            "--image-size",
            "16",
            "--rounds",
            arguments.rounds + 1,
            *tls_flags(certs, "server"),
        ],
        folder,
        **environment,
    )
    memory = Peak(server)
    lines = iter(server.stdout)
    address = next(found[1] for line in lines if (found := re.search(r"listening on (\S+)", line)))
    clients = [
        start(
            [
                HERE / "standin.py",
                "todoClient",
                "--name",
                name,
                "--server",
                address,
                "--index",
                "index/worker1.pkl",
                *tls_flags(certs, name),
            ],
            folder,
            **environment,
        )
        for name in names
    ]
    together(server, *clients)
    peaks = [Peak(client) for client in clients]
    waiting = set(names)

    def follow(client, peak):
        for line in client.stdout:
            if "training on" in line and peak.level is None:  # its first download is over
                if len(waiting) == len(names):
                    memory.mark()
                waiting.discard(line.split(":")[0])
                peak.level = 0

    followers = [
        threading.Thread(target=follow, args=pair) for pair in zip(clients, peaks, strict=True)
    ]
    for follower in followers:
        follower.start()
    for _ in lines:
        pass
    for follower in followers:
        follower.join()
    all_ended(server, *clients)
    with open(folder / "server" / "history.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)][1:]
    idle = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1]); sys.argv = ['']\n"
            "import standin; sys.modules['model'] = standin; import todoClient\n"
            "print(open('/proc/self/statm').read().split()[1])",
            str(HERE),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    idle = int(idle) * os.sysconf("SC_PAGE_SIZE")
    return {
        "seconds": seconds,
        "server": memory.peak - memory.level,
        "client": max(peak.peak for peak in peaks) - idle,
    }


def bare_rounds(folder, weights, arguments):
    folder.mkdir()
    server = start(
        [HERE / "bare.py", "server", weights, arguments.clients, arguments.rounds + 1], folder
    )
    lines = iter(server.stdout)
    port = next(lines).strip()
    clients = [
        start([HERE / "bare.py", "client", port, arguments.rounds + 1, f"c{number}"], folder)
        for number in range(arguments.clients)
    ]
    together(server, *clients)
    seconds = [float(line) for line in lines]
    all_ended(server, *clients)
    return {"seconds": seconds[1:], "server": None, "client": None}


def report(results, arguments):
    floor = statistics.median(results["floor"]["seconds"])
    moved = 2 * arguments.clients * arguments.megabytes
    print(
        f"{arguments.clients} clients, {arguments.megabytes:g} MB, medians of {arguments.rounds} rounds\n"
    )
    print(
        "| form | seconds a round | MB of weights moved | MB on the wire | server peak above its level, MB | "
        "client peak above idle, MB | ratio to the floor |"
    )
    print("|---|---|---|---|---|---|---|")
    for form, result in results.items():
        seconds = statistics.median(result["seconds"])
        wire = moved * (4 / 3 if form == "base64" else 1)
        memory = [
            "-" if result[who] is None else f"{result[who] / 1e6:.0f}"
            for who in ("server", "client")
        ]
        print(
            f"| {form} | {seconds:.2f} | {moved:.0f} | {wire:.0f} | {' | '.join(memory)} | {seconds / floor:.2f} |"
        )
    print()
    for form in results:
        if form != "floor":
            print(
                f"ratio_to_floor{'' if form == 'blob' else '_' + form} "
                f"{statistics.median(results[form]['seconds']) / floor:.2f}"
            )


if __name__ == "__main__":
    main()
