"""The thesis demo's wire (Liang 2020), written from its description.

A client and a server that know fields 1 to 3 only, send one base64 text in pieces of 100,000
characters, and accept no message above 100,050 bytes.
"""

import base64
import math
from concurrent import futures

import grpc

from generated import todo_pb2, todo_pb2_grpc

LIMITS = [("grpc.max_send_message_length", 100_050), ("grpc.max_receive_message_length", 100_050)]


def cut(content, **fields):
    text = base64.b64encode(content).decode()
    for i in range(math.ceil(len(text) / 100_000)):
        yield todo_pb2.modelWeight(model=text[i * 100_000 : (i + 1) * 100_000], **fields)


def seed_client(address, name, size, rounds, train, timeout_s=60):
    """Take part in `rounds` rounds; train(bytes of the weight file) -> bytes of the trained one.

    Returns what it fetched, a list of bytes, one a round.
    """
    fetched = []
    for _ in range(rounds):
        # Each on a connection of its own, as processes have it: one takes few calls at a time.
        options = [*LIMITS, ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options=options) as channel:
            stub = todo_pb2_grpc.FedMLStub(channel)
            content = base64.b64decode(
                "".join(piece.model for piece in stub.getWeight(todo_pb2.void(), timeout=timeout_s))
            )
            fetched.append(content)
            answer = stub.sendWeight(
                cut(train(content), clientname=f"{name}/client_weights.h5", clientsize=size),
                timeout=timeout_s,
            )
            assert answer.value == 1
    return fetched


class SeedServer(todo_pb2_grpc.FedMLServicer):
    """For one client: the weights of the next round are those that it sent.

    uploads   [(name on the wire, bytes, size)] of those that were merged
    messages  the size of each message of every upload
    answers   to the first uploads: 1 means that it was merged, None that the server goes away;
              then 1
    """

    def __init__(self, content, answers=()):
        self.content, self.answers = content, list(answers)
        self.uploads, self.messages, self.is_told = [], [], False

    def getWeight(self, request, context):
        yield from cut(self.content)

    def sendWeight(self, request_iterator, context):
        assert not [key for key, _ in context.invocation_metadata() if key.startswith("fedml-")]
        pieces = list(request_iterator)
        self.messages += [piece.ByteSize() for piece in pieces]
        value = self.answers.pop(0) if self.answers else 1
        if value is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        if value == 1:
            text = "".join(piece.model for piece in pieces)
            self.content = base64.b64decode(text, validate=True)
            self.uploads.append((pieces[-1].clientname, self.content, pieces[-1].clientsize))
        return todo_pb2.myResponse(value=value)

    def tell(self, request, context):
        self.is_told = True  # it has no such call

    def start(self):
        server = grpc.server(futures.ThreadPoolExecutor(10), options=LIMITS)
        todo_pb2_grpc.add_FedMLServicer_to_server(self, server)
        port = server.add_insecure_port("localhost:0")
        server.start()
        return server, f"localhost:{port}"
