"""The federated round: gRPC service, barrier and resume, weight files, TLS.

Knows nothing of fundus images.
"""
