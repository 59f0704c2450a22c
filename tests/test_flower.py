"""The same federation under Flower, by the commands of its README: its merged weights are ours.

Needs flower_app/requirements.txt; without it this is skipped.
"""

import flower
import numpy as np
import pytest
from conftest import processes_in, read_weights, start_server, until

from reporting import card as cards

CLIENTS = ["client001", "client002", "client003"]
CLOSE = {1: 1e-6, 2: 1e-4}  # rounds -> how far apart a number may be
SETTINGS = {"image_size": 32, "seed": 0, "batch_size": 4, "threads": 1}


def ours(start, site, rounds):
    """The merged weights of todoServer and three todoClients after so many rounds."""
    folder = f"server-{rounds}"
    server, address = start_server(
        start, site, "--rounds", rounds, "--image-size", 32, "--server-dir", folder
    )
    clients = [
        start(
            "todoClient.py",
            *("--name", name, "--server", address, "--client-dir", f"{name}-{rounds}"),
            *("--batch-size", 4, "--threads", 1),
            cwd=site,
        )
        for name in CLIENTS
    ]
    assert [process.wait(400) for process in [*clients, server]] == [0, 0, 0, 0], server.output
    return read_weights(site / folder / "server_weight.h5")


@pytest.mark.slow
@pytest.mark.skipif(not flower.IS_INSTALLED, reason="flwr is absent (flower_app/requirements.txt)")
@pytest.mark.parametrize("rounds", CLOSE)
def test_flowers_merged_weights_are_ours(start, site, rounds):
    system = flower.Flower(site, CLIENTS)
    try:
        output = system.run(rounds=rounds, **SETTINGS)
    finally:
        system.stop()
    path = site / "flower" / "server_weight.h5"
    assert path.exists(), output + system.link.output
    assert len((site / "flower" / "history.csv").read_text().splitlines()) == 1 + rounds
    card = cards.read(path)  # its model card, which refuses other weights
    assert card["clients"] == {"client001": 8, "client002": 10, "client003": 12}
    pairs = zip(ours(start, site, rounds), read_weights(path), strict=True)
    distances = [np.abs(one - other).max() for one, other in pairs]
    assert max(distances) <= CLOSE[rounds], distances
    until(lambda: not processes_in(site), lambda: f"all have ended: {processes_in(site)}", 30)
