"""A server within this process, for tests and benchmarks: they build it here, and nowhere else."""

import grpc
from conftest import Run, until

import todoServer
from common import files
from federation import service, weights
from generated import todo_pb2, todo_pb2_grpc


def serve(rounds, listen="localhost:0", credentials=None, **options):
    """(started gRPC server, its HOST:PORT) for these Rounds.

    credentials  from tls.server_credentials; None is plaintext
    options      of todoServer.FedMLServicer: max_examples, serve_unnamed, card_text
    """
    return service.create_server(servicer_of(rounds, **options), listen, credentials)


def servicer_of(rounds, max_examples=10_000_000, serve_unnamed=True, card_text=lambda: ""):
    return todoServer.FedMLServicer(rounds, max_examples, serve_unnamed, card_text)


def connection(address):
    """A channel with a connection of its own, as processes have it: one takes few calls at once."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    return grpc.insecure_channel(address, options)


class Peer:
    """A client of ours by hand, in a run named run0."""

    def __init__(self, channel, name):
        self.name = name
        self.is_me = [("fedml-client", name)]
        self.stub = todo_pb2_grpc.FedMLStub(channel)

    def send(self, path, /, **changes):
        """A future: the answer to an upload of 3 examples; a change of its metadata may be None."""
        named = {"client": self.name, "run": "run0", "round": "1"}
        named |= {"sha256": files.sha256_of(path), **changes}
        return self.stub.sendWeight.future(
            weights.blob_messages(path, self.name, 3),
            metadata=[(f"fedml-{name}", value) for name, value in named.items() if value],
            timeout=60,
        )

    def fetch(self):
        """The call: a stream of messages."""
        metadata = [*self.is_me, ("fedml-accept", "blob")]
        return self.stub.getWeight(todo_pb2.void(), metadata=metadata, timeout=60)

    def tell(self, phase="training", run="run0", round_number=1, scores=None, **where):
        """The answer to a report: the open round."""
        status = todo_pb2.clientStatus(
            run=run, round=round_number, phase=phase, scores=scores or {}, **where
        )
        return self.stub.tell(status, metadata=self.is_me, timeout=60)


class Served:
    """A run of 10,000 rounds for client001 and client002 behind a server, and a channel to it."""

    def __init__(self, folder, **options):
        self.folder = folder
        self.run = Run(folder / "server", ["client001", "client002"], rounds=10_000)
        servicer = servicer_of(self.run.rounds, **options)
        self.service = servicer.service
        self.server, self.address = service.create_server(servicer, "localhost:0")
        self.channel = connection(self.address)
        self.stub = todo_pb2_grpc.FedMLStub(self.channel)

    @property
    def round(self):
        """The number of the open round."""
        return self.run.rounds.state.round

    def send(self, path, name, /, **changes):
        """A future: the answer to an upload for the open round."""
        return Peer(self.channel, name).send(path, **{"round": str(self.round), **changes})

    def counted(self, path, client):
        """The same, once the upload is counted and its call waits."""
        waiting = self.run.rounds.waiting
        before, call = waiting.get(client), self.send(path, client)
        until(
            lambda: waiting.get(client) is not before or call.done(),
            f"{client} is counted",
        )
        assert not call.done(), call.exception()
        return call

    def fetch(self, name):
        return Peer(self.channel, name).fetch()

    def tell(self, name, *words, **where):
        return Peer(self.channel, name).tell(*words, **where)

    def tree(self):
        """Every file below and beside the server's folder with its bytes."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
        }

    def said(self, keyword):
        """The lines of the server's log with this keyword."""
        return [line for line in self.run.said if keyword in line]

    def close(self):
        self.run.stop()
        self.channel.close()
        self.server.stop(0).wait()


def refusal(call):
    """(the name of its status code, its sentence) of a call that is refused."""
    error = call.exception(60)
    assert error is not None, "it was not refused"
    return error.code().name, error.details()
