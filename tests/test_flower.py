"""The same federation under Flower, by the commands of its README: its merged weights are ours.

Needs flower_app/requirements.txt; without it this is skipped.
"""

import flower
import numpy as np
import pytest
from conftest import CLIENTS, processes_in, read_weights, start_server, until

from reporting import card as cards

SETTINGS = {"rounds": 2, "image_size": 32, "seed": 0, "batch_size": 4, "threads": 1}


def ours(start, site):
    """The merged weights of todoServer and three todoClients."""
    server, address = start_server(start, site, "--rounds", 2, "--image-size", 32)
    flags = ["--server", address, "--batch-size", 4, "--threads", 1]
    clients = [start("todoClient.py", "--name", name, *flags, cwd=site) for name in CLIENTS]
    assert [process.wait(400) for process in [*clients, server]] == [0, 0, 0, 0], server.output
    return read_weights(site / "server" / "server_weight.h5")


@pytest.mark.slow
@pytest.mark.skipif(not flower.IS_INSTALLED, reason="flwr is absent (flower_app/requirements.txt)")
def test_flowers_merged_weights_are_ours(start, site):
    system = flower.Flower(site, CLIENTS)
    try:
        output = system.run(**SETTINGS)
    finally:
        system.stop()
    path = site / "flower" / "server_weight.h5"
    assert path.exists(), output + system.link.output
    assert len((site / "flower" / "history.csv").read_text().splitlines()) == 3
    card = cards.read(path)  # its model card, which refuses other weights
    assert card["clients"] == {"client001": 8, "client002": 10, "client003": 12}
    pairs = zip(ours(start, site), read_weights(path), strict=True)
    assert max(np.abs(one - other).max() for one, other in pairs) <= 1e-4
    until(lambda: not processes_in(site), lambda: f"all have ended: {processes_in(site)}", 30)
