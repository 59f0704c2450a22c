"""How the server's time and memory grow with the number of clients and the size of the model.

    python3 benchmarks/scaling.py
    python3 benchmarks/scaling.py --evaluate     # the server with TensorFlow, which evaluates after each round

The server is the real one, the clients are the real client's code on threads of one bare process without TensorFlow;
nobody trains or, by default, evaluates. Server seconds are processor time, so that the clients' work on the same cores does
not count; memory is the median of the last rounds' peaks, and its level that after the first served download.
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

import round_overhead
import standin

ROUNDS = 5


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="memory of the whole server, with TensorFlow"
    )
    parser.add_argument("--peers", nargs=2, help=argparse.SUPPRESS)  # the bare process calls itself
    arguments = parser.parse_args(argv)
    if arguments.peers:
        return peers(*arguments.peers)
    if arguments.evaluate:
        evaluating()
    else:
        growing()


def growing():
    print(f"medians of {ROUNDS} rounds\n")
    print(
        "| clients | MB | MB moved a round | seconds a round | server CPU seconds a round | a GB moved | "
        "server peak, MB | above its level, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for clients, megabytes, rounds in [
        (3, 10, ROUNDS),
        (6, 10, ROUNDS),
        (12, 10, ROUNDS),
        (24, 10, ROUNDS),
        (48, 10, ROUNDS),
        (3, 1, ROUNDS),
        (3, 100, ROUNDS),
        (3, 400, 3),
        (3, 1, 100),
    ]:
        with tempfile.TemporaryDirectory() as name:
            weights = Path(name) / "start.h5"
            standin.make_weights(weights, megabytes)
            seconds, cpu, peak, above = measure(
                Path(name), clients, rounds, weights, [HERE / "standin.py", "todoServer"]
            )
        moved = 2 * clients * megabytes
        note = f" ({rounds} rounds)" if rounds != ROUNDS else ""
        print(
            f"| {clients} | {megabytes}{note} | {moved} | {seconds:.2f} | {cpu:.2f} | {cpu / moved * 1000:.1f} | "
            f"{peak / 1e6:.1f} | {above / 1e6:.1f} |",
            flush=True,
        )


def evaluating():
    print(
        "| network | MB | clients | server peak, MB | above its level, MB |\n|---|---|---|---|---|"
    )
    for arch, size, rounds in [("drcnn", 128, ROUNDS), ("vgg16", 64, 2)]:
        for clients in (3, 48):
            with tempfile.TemporaryDirectory() as name:
                weights = Path(name) / "server" / "server_weight.h5"
                server = [HERE.parent / "todoServer.py", "--arch", arch]
                *_, peak, above = measure(Path(name), clients, rounds, weights, server, size)
                megabytes = weights.stat().st_size / 1e6
            print(
                f"| {arch}, {size} px | {megabytes:.1f} | {clients} | {peak / 1e6:.0f} | {above / 1e6:.0f} |",
                flush=True,
            )


def measure(folder, clients, rounds, weights, command, size=16):
    """(seconds, server CPU seconds, server peak bytes, bytes above its level) of a round"""
    round_overhead.index_of_one(folder)
    names = ",".join(f"client{number + 1:03}" for number in range(clients))
    environment = {"BENCHMARK_WEIGHTS": str(weights)}
    server = round_overhead.start(
        [
            *command,
            "--listen",
            "localhost:0",
            "--clients",
            names,
            "--image-size",
            size,
            "--rounds",
            rounds + 1,
        ],
        folder,
        **environment,
    )
    memory = round_overhead.Peak(server)
    cpu, peaks = [], []

    def follow(bare):
        for line in bare.stdout:
            if "training on" in line and memory.level is None:  # the first served download is over
                memory.mark()
                bare.stdin.close()  # the others begin

    for line in server.stdout:
        if found := re.search(r"listening on (\S+)", line):
            bare = round_overhead.start(
                [HERE / "scaling.py", "--peers", found[1], clients], folder, **environment
            )
            round_overhead.together(server, bare)
            threading.Thread(target=follow, args=[bare], daemon=True).start()
        if "loss" in line:
            peaks.append(memory.begin_again())
            fields = Path(f"/proc/{server.pid}/stat").read_text().rsplit(")")[-1].split()
            cpu.append((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    round_overhead.all_ended(server, bare)
    with open(folder / "server" / "history.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)][1:]
    peak = statistics.median(peaks[-min(rounds, ROUNDS) :])
    return (
        statistics.median(seconds),
        statistics.median(b - a for a, b in zip(cpu, cpu[1:], strict=False)),
        peak,
        peak - memory.level,
    )


def peers(address, clients):
    """`clients` real clients on threads of this process; once the first has its weights and stdin ends, the others."""
    sys.modules["model"] = standin
    import todoClient

    def take_part(name):
        try:
            Path(name).mkdir()
            todoClient.federate(
                todoClient.Site(
                    todoClient.parse(
                        ["--name", name, "--server", address, "--index", "index/worker1.pkl"]
                    )
                )
            )
        except todoClient.Finished:
            pass
        except BaseException as error:  # the others would wait for it
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    threads = [
        threading.Thread(target=take_part, args=[f"client{number + 1:03}"])
        for number in range(int(clients))
    ]
    threads[0].start()
    sys.stdin.read()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
