"""The floor: the least that moves, averages and stores the same bytes with the same libraries. No checks, no state."""

import os
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import grpc
import h5py
import numpy as np
import standin

from generated import todo_pb2, todo_pb2_grpc

PIECE = 1 << 20
OPTIONS = [("grpc.max_receive_message_length", 2 * PIECE)]


def pieces(path):
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
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
        self.path, self.clients, self.arrived, self.round = start, clients, [], 0
        self.changed, self.began = threading.Condition(), None

    def getWeight(self, request, context):
        self.began = self.began or time.monotonic()
        yield from pieces(self.path)

    def sendWeight(self, request_iterator, context):
        path = f"{threading.get_ident()}.h5"
        receive(request_iterator, path)
        with self.changed:
            number = self.round
            self.arrived.append(path)
            if len(self.arrived) == self.clients:
                self.average()
                now = time.monotonic()
                print(now - self.began, flush=True)
                self.began, self.arrived, self.round = now, [], number + 1
                self.changed.notify_all()
            while self.round == number:
                self.changed.wait()
        return todo_pb2.myResponse(value=1)

    def average(self):
        with h5py.File(self.path, "r") as old, h5py.File("next.h5", "w") as new:
            opened = [h5py.File(path, "r") for path in self.arrived]
            new.attrs["layer_names"] = old.attrs["layer_names"]
            for name in old.attrs["layer_names"]:
                values = [file[name]["kernel"][()].astype(np.float64) for file in opened]
                group = new.create_group(name)
                group.attrs["weight_names"] = [b"kernel"]
                group["kernel"] = (sum(values) / len(values)).astype(np.float32)
            for file in opened:
                file.close()
        fsync("next.h5")
        os.replace("next.h5", "merged.h5")
        self.path = "merged.h5"


def main(role, *arguments):
    if role == "server":
        start, clients, rounds = arguments[0], int(arguments[1]), int(arguments[2])
        server = grpc.server(futures.ThreadPoolExecutor(2 * clients + 4), options=OPTIONS)
        servicer = Bare(start, clients)
        todo_pb2_grpc.add_FedMLServicer_to_server(servicer, server)
        print(server.add_insecure_port("localhost:0"), flush=True)
        server.start()
        with servicer.changed:
            servicer.changed.wait_for(lambda: servicer.round == rounds)
        server.stop(10).wait()
    else:
        port, rounds, name = arguments[0], int(arguments[1]), arguments[2]
        with grpc.insecure_channel(f"localhost:{port}", OPTIONS) as channel:
            stub = todo_pb2_grpc.FedMLStub(channel)
            for _ in range(rounds):
                receive(stub.getWeight(todo_pb2.void()), f"{name}.h5")
                standin.add_constant(f"{name}.h5", f"{name}_trained.h5")
                fsync(f"{name}_trained.h5")
                stub.sendWeight(pieces(f"{name}_trained.h5"))


if __name__ == "__main__":
    main(*sys.argv[1:])
