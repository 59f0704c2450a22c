"""Uploads and downloads over a slow line: how much of its rate they use.

    python3 benchmarks/slow_line.py                             # 100 Mbit/s; 40 and 100 ms
    python3 benchmarks/slow_line.py --megabytes 84.6 --mbit 100 --round-trip-ms 40

Each client has a line of its own: a proxy on this machine that passes on so many bytes a second,
each half a round trip later. No emulation of a network is needed. The server is the real one; the
clients are the real codec on gRPC without training. Rates are those of the file's bytes: base64
has 4 characters for 3 bytes, so of the line's rate only 3/4 can be reached.

The last column is the ratio to what the line can carry of these bytes, of the slowest client.
"""

import argparse
import asyncio
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import grpc
import standin
from processes import STANDIN, line_with, start, write_indexes

import todoClient
from common.files import sha256_of
from common.script import new_parser
from federation import weights
from generated import todo_pb2, todo_pb2_grpc

PIECE_BYTES = 16 << 10  # that the line passes on at a time
QUEUE_S = 0.02  # how much may wait before the line, as time that it needs


def main(argv=None):
    arguments = parse(argv)
    if arguments.line:
        to_port, mbit, round_trip_ms = arguments.line
        asyncio.run(serve_line(int(to_port), float(mbit), float(round_trip_ms)))
        return
    with tempfile.TemporaryDirectory() as name:
        path = standin.write_weights(
            Path(name) / "start.h5", 0, standin.shapes_of_size(arguments.megabytes)
        )
        print(
            f"{arguments.megabytes:g} MB, a line of {arguments.mbit:g} Mbit/s for each client, "
            f"medians of {arguments.repeats}\n"
        )
        print("| round trip, ms | clients | form | direction | MB/s a client | of the line |")
        print("|---|---|---|---|---|---|")
        for round_trip_ms in arguments.round_trip_ms:
            for clients in arguments.clients:
                for form in ("blob", "base64"):
                    measure(Path(name), path, arguments, round_trip_ms, clients, form)


def parse(argv):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--megabytes", type=float, default=84.6, help="of the model (default: %(default)s)")
    add("--mbit", type=float, default=100, help="a second, of a line (default: %(default)s)")
    add("--round-trip-ms", type=float, nargs="+", default=[40, 100], help="(default: 40 100)")
    add("--clients", type=int, nargs="+", default=[1, 3], help="(default: 1 3)")
    add("--repeats", type=int, default=3, help="of each measurement (default: %(default)s)")
    add("--line", nargs=3, help=argparse.SUPPRESS)  # this script starts itself as a line
    return parser.parse_args(argv)


def measure(folder, path, arguments, round_trip_ms, clients, form):
    """Print two lines of the table: all clients download at once, then upload at once."""
    work = folder / f"{round_trip_ms:g}-{clients}-{form}"
    write_indexes(work)
    names = [f"client{number + 1:03}" for number in range(clients)]
    # One client more than takes part: so no round is ever merged, and no call waits for a merge.
    command = [STANDIN, "todoServer", "--listen", "localhost:0", "--image-size", "16"]
    command += ["--clients", ",".join([*names, "absent"])]
    server = start(command, work, STANDIN_WEIGHTS=str(path))
    address = line_with(server, r"listening on (\S+)")[1]
    lines = [Line(address, arguments.mbit, round_trip_ms) for _ in names]
    size = path.stat().st_size
    carried = arguments.mbit * 1e6 / 8
    if form == "base64":
        carried *= 3 / 4
    try:
        for direction, transfer in (("down", download), ("up", upload)):
            rates = []
            for _ in range(arguments.repeats):
                seconds = at_once(transfer, names, lines, work, form)
                rates.append(size / max(seconds))
            rate = statistics.median(rates)
            print(
                f"| {round_trip_ms:g} | {clients} | {form} | {direction} | {rate / 1e6:.2f} "
                f"| {rate / carried:.2f} |",
                flush=True,
            )
    finally:
        server.kill()
        server.wait()
        for line in lines:
            line.stop()


def when_replaced(path, before):
    """When the server has accepted an upload: the client's file there is another one than before.

    The file's time: its change when it was renamed, on the clock of time.time().
    """
    limit = time.monotonic() + 600
    while time.monotonic() < limit:
        if changed_at(path) != before:
            return changed_at(path)
        time.sleep(0.001)  # there is no call that answers before the round is merged
    raise TimeoutError(f"{path} was not replaced within 600 s")


def changed_at(path):
    return path.stat().st_ctime if path.exists() else None


def at_once(transfer, names, lines, work, form):
    """Seconds of each client's transfer; all begin at once, on connections of their own."""
    seconds, errors = [], []

    def run(name, line):
        client = SimpleNamespace(
            arguments=todoClient.parse(["--name", name, "--server", line.address]),
            state={"run": "known"},
        )
        try:
            with todoClient.connect(client) as channel:
                grpc.channel_ready_future(channel).result(30)
                stub = todo_pb2_grpc.FedMLStub(channel)
                seconds.append(transfer(stub, name, work / f"{name}.h5", form))
        except BaseException as error:
            errors.append(f"{name}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=pair) for pair in zip(names, lines, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        sys.exit(f"benchmark: error: {errors[0]}")
    return seconds


def download(stub, name, path, form):
    metadata = [("fedml-client", name)]
    if form == "blob":
        metadata.append(("fedml-accept", "blob"))
    started = time.monotonic()
    call = stub.getWeight(todo_pb2.void(), metadata=metadata)
    weights.spool(call, path, 4 << 30)
    seconds = time.monotonic() - started
    run = dict(call.initial_metadata())["fedml-run"]
    path.with_suffix(".run").write_text(run)
    return seconds


def upload(stub, name, path, form):
    metadata = (
        ("fedml-client", name),
        ("fedml-run", path.with_suffix(".run").read_text()),
        ("fedml-round", "1"),
        ("fedml-sha256", sha256_of(path)),
    )
    messages = weights.blob_messages if form == "blob" else weights.base64_messages
    accepted = path.parent / "server" / name / "client_weights.h5"
    before = changed_at(accepted)
    started = time.time()
    call = stub.sendWeight.future(messages(path, name, 1), metadata=metadata)
    ended = when_replaced(accepted, before)
    call.cancel()  # its round is never merged
    return ended - started


# --- the line: a process of its own --------------------------------------------------------------


class Line:
    """A port of this machine behind which another one lies, at the end of a slow line."""

    def __init__(self, to_address, mbit, round_trip_ms):
        to_port = to_address.rpartition(":")[2]
        self.process = start([__file__, "--line", to_port, mbit, round_trip_ms], ROOT)
        self.address = f"localhost:{self.process.stdout.readline().strip()}"

    def stop(self):
        self.process.kill()
        self.process.wait()


async def serve_line(to_port, mbit, round_trip_ms):
    """Pass on what comes, both ways, at the line's rate and half a round trip later."""
    bytes_per_s = mbit * 1e6 / 8
    delay_s = round_trip_ms / 2000

    async def connected(reader, writer):
        far_reader, far_writer = await asyncio.open_connection("localhost", to_port)
        await asyncio.gather(
            pass_on(reader, far_writer, bytes_per_s, delay_s),
            pass_on(far_reader, writer, bytes_per_s, delay_s),
        )

    server = await asyncio.start_server(connected, "localhost", 0, family=socket.AF_INET)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def pass_on(reader, writer, bytes_per_s, delay_s):
    """One direction of a connection."""
    on_the_way = asyncio.Queue()  # (when it arrives, bytes)
    arrivals = asyncio.ensure_future(deliver(on_the_way, writer))
    free_at = time.monotonic()  # when the line has sent all that has entered it
    piece = None
    while piece != b"":
        try:
            piece = await reader.read(PIECE_BYTES)
        except ConnectionError:
            piece = b""
        now = time.monotonic()
        free_at = max(free_at, now) + len(piece) / bytes_per_s
        on_the_way.put_nowait((free_at + delay_s, piece))
        # What the line has not sent yet waits before it, as in a router, so that it never stands
        # still because this process slept too long. More than that stays with the sender.
        if free_at - now > QUEUE_S:
            await asyncio.sleep(free_at - now - QUEUE_S / 2)
    await arrivals


async def deliver(on_the_way, writer):
    piece = None
    try:
        while piece != b"":
            arrives_at, piece = await on_the_way.get()
            await asyncio.sleep(max(0, arrives_at - time.monotonic()))
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        pass  # the other end is gone
    writer.close()


if __name__ == "__main__":
    main()
