"""The floor: the least that moves, averages and stores the same bytes with the same libraries.

Bare gRPC in pieces of 1 MiB; clients read the tensors with h5py, add a constant and write the file;
a float64 average in NumPy; all files are synchronized. No checks, no hashes, no state.

    python3 benchmarks/bare.py server WEIGHTS CLIENTS ROUNDS     # prints its port
    python3 benchmarks/bare.py client PORT ROUNDS NAME

A client trains when it reads a line on stdin, as the stand-in of the real one does.
"""

import os
import shutil
import sys
import threading
from concurrent import futures
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpc
import h5py
import numpy as np

from federation import weights
from generated import todo_pb2, todo_pb2_grpc

PIECE_BYTES = 1 << 20
OPTIONS = [("grpc.max_receive_message_length", 2 * PIECE_BYTES)]


def add_constant(path, target):
    """`target` is `path` with a constant added to every number: the cheapest "training"."""
    shutil.copyfile(path, target)
    with h5py.File(target, "r+") as file:
        for *_, dataset in weights.datasets(file):
            dataset[...] = dataset[()] + np.float32(0.001)


def pieces(path):
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield todo_pb2.modelWeight(blob=piece)


def receive(messages, path):
    with open(path, "wb", buffering=0) as file:
        for message in messages:
            file.write(message.blob)
        os.fsync(file.fileno())


def fsync(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class Bare(todo_pb2_grpc.FedMLServicer):
    def __init__(self, start, clients):
        self.path = start
        self.clients = clients
        self.arrived = []  # paths of the open round's uploads
        self.round = 0
        self.changed = threading.Condition()

    def getWeight(self, request, context):
        yield from pieces(self.path)

    def sendWeight(self, request_iterator, context):
        path = f"{threading.get_ident()}.h5"
        receive(request_iterator, path)
        with self.changed:
            number = self.round
            self.arrived.append(path)
            if len(self.arrived) == self.clients:
                self.average()
                self.arrived = []
                self.round = number + 1
                self.changed.notify_all()
            while self.round == number:
                self.changed.wait()
        return todo_pb2.myResponse(value=1)

    def average(self):
        with h5py.File(self.path, "r") as old, h5py.File("next.h5", "w") as new:
            uploads = [h5py.File(path, "r") for path in self.arrived]
            new.attrs["layer_names"] = old.attrs["layer_names"]
            for layer in old.attrs["layer_names"]:
                group = new.create_group(layer)
                group.attrs["weight_names"] = old[layer].attrs["weight_names"]
                for weight in old[layer].attrs["weight_names"]:
                    values = [file[layer][weight][()].astype(np.float64) for file in uploads]
                    group[weight] = (sum(values) / len(values)).astype(np.float32)
            for file in uploads:
                file.close()
        fsync("next.h5")
        os.replace("next.h5", "merged.h5")
        self.path = "merged.h5"


def serve(start, clients, rounds):
    server = grpc.server(futures.ThreadPoolExecutor(2 * clients + 4), options=OPTIONS)
    servicer = Bare(start, clients)
    todo_pb2_grpc.add_FedMLServicer_to_server(servicer, server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    print(f"listening on localhost:{port}", flush=True)
    with servicer.changed:
        servicer.changed.wait_for(lambda: servicer.round == rounds)
    server.stop(10).wait()


def take_part(address, rounds, name):
    with grpc.insecure_channel(address, OPTIONS) as channel:
        stub = todo_pb2_grpc.FedMLStub(channel)
        for _ in range(rounds):
            receive(stub.getWeight(todo_pb2.void()), f"{name}.h5")
            print("training now", flush=True)
            sys.stdin.readline()
            add_constant(f"{name}.h5", f"{name}_trained.h5")
            fsync(f"{name}_trained.h5")
            stub.sendWeight(pieces(f"{name}_trained.h5"))


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        take_part(sys.argv[2], int(sys.argv[3]), sys.argv[4])
