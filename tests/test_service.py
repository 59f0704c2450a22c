"""service.py: what the interceptor does for every kind of call, whatever rpcs todo.proto has."""

import threading
from concurrent import futures
from types import SimpleNamespace

import grpc
import pytest

from federation.rounds import Refused
from federation.service import CallInterceptor, Calls
from generated import todo_pb2

VOID = (todo_pb2.void.FromString, todo_pb2.void.SerializeToString)
EMPTY = b""  # a void on the wire


def methods(behave):
    """{name: handler} of a servicer with one method of each kind; behave() is called in each."""

    def one(request_or_requests, context):
        behave()
        return todo_pb2.void()

    def stream(request_or_requests, context):
        behave()
        yield todo_pb2.void()
        yield todo_pb2.void()

    return {
        "oneToOne": grpc.unary_unary_rpc_method_handler(one, *VOID),
        "oneToStream": grpc.unary_stream_rpc_method_handler(stream, *VOID),
        "streamToOne": grpc.stream_unary_rpc_method_handler(one, *VOID),
        "streamToStream": grpc.stream_stream_rpc_method_handler(stream, *VOID),
    }


class Server:
    """A gRPC server of one thread with these methods and the interceptor, and a channel to it."""

    def __init__(self, behave=lambda: None):
        self.said = []
        rounds = SimpleNamespace(over=None)
        calls = SimpleNamespace(rounds=rounds, say=self.said.append)
        calls.refuse = lambda *arguments: Calls.refuse(calls, *arguments)
        calls.refusals = lambda context: Calls.refusals(calls, context)
        self.server = grpc.server(
            futures.ThreadPoolExecutor(1), interceptors=[CallInterceptor(calls)]
        )
        handlers = methods(behave)
        # as the generated add_..._to_server does it
        generic = grpc.method_handlers_generic_handler("test.Service", handlers)
        self.server.add_generic_rpc_handlers((generic,))
        self.server.add_registered_method_handlers("test.Service", handlers)
        port = self.server.add_insecure_port("localhost:0")
        self.server.start()
        self.channel = grpc.insecure_channel(f"localhost:{port}")

    def call(self, name):
        """How often an ordinary stub gets an answer. Raises grpc.RpcError."""
        path = f"/test.Service/{name}"
        if name == "oneToOne":
            self.channel.unary_unary(path)(EMPTY, timeout=20)
            return 1
        if name == "oneToStream":
            return len(list(self.channel.unary_stream(path)(EMPTY, timeout=20)))
        if name == "streamToOne":
            self.channel.stream_unary(path)(iter([EMPTY]), timeout=20)
            return 1
        return len(list(self.channel.stream_stream(path)(iter([EMPTY]), timeout=20)))

    def close(self):
        self.channel.close()
        self.server.stop(0).wait()


@pytest.fixture
def serve():
    made = []

    def make(*arguments):
        made.append(Server(*arguments))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.mark.parametrize("name", methods(None))
def test_every_kind_of_call_is_served_and_refused(serve, name):
    assert serve().call(name) == (2 if name.endswith("ToStream") else 1)

    def refuse():
        raise Refused("PERMISSION_DENIED", "not you")

    server = serve(refuse)
    with pytest.raises(grpc.RpcError) as caught:
        server.call(name)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert caught.value.details() == "not you"
    assert server.said == ["refused: not you (PERMISSION_DENIED)"]


def test_a_call_that_says_nothing_holds_no_thread(serve):
    """Ten calls of one request and a streamed answer are opened, and their request never comes."""
    server, over = serve(), threading.Event()

    def nothing():
        over.wait(60)
        yield from ()

    silent = server.channel.stream_stream("/test.Service/oneToStream")
    calls = [silent(nothing(), timeout=60) for _ in range(10)]
    assert server.call("oneToOne") == 1, "the server's one thread is free"
    # and what they get is what the method answers to an empty request
    assert [len(list(call)) for call in calls] == [2] * 10
    over.set()


def test_a_method_that_does_not_exist_is_unimplemented(serve):
    with pytest.raises(grpc.RpcError) as caught:
        serve().channel.unary_unary("/test.Service/other")(EMPTY, timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
