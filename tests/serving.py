"""A server within this process, for tests and benchmarks: they build it here, and nowhere else."""

import todoServer
from federation import service


def serve(rounds, listen="localhost:0", credentials=None, **options):
    """(started gRPC server, its HOST:PORT) for these Rounds.

    credentials  from tls.credentials; None is plaintext
    options      of todoServer.FedMLServicer: max_examples, serve_unnamed
    """
    servicer = todoServer.FedMLServicer(rounds, **options)
    return service.create_server(servicer, listen, credentials)
