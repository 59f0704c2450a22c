"""A client or a server of the thesis demo takes part (DESIGN 2, "the old peer")."""

import threading

import pytest
from conftest import averaged, random_tensors, read_weights, same_bits, start_server, write_weights
from seed_peer import SeedServer, seed_client
from serving import serve

import data
import model
import todoClient
from federation import weights
from federation.rounds import Rounds
from federation.state import RunState

LARGE = [
    ("conv", (3, 3, 64, 64)),
    ("dense", (300, 300)),
    ("dense", (300,)),
]  # several of the seed's messages long


def test_three_old_clients_complete_three_rounds_one_changing_nothing(tmp_path):
    path = write_weights(tmp_path / "server_weight.h5", 0, LARGE, root="model_weights")
    clients = ["client001", "client002", "client003"]
    for name in clients:
        (tmp_path / name).mkdir()
    merges = []

    def merge(paths, sizes):
        merges.append(
            [
                (each.parent.name, size, read_weights(each))
                for each, size in zip(paths, sizes, strict=True)
            ]
        )
        return weights.fedavg(paths, sizes, weights.Layout(path), path)

    def evaluate():
        return dict.fromkeys(("loss", "accuracy", "auc", "sensitivity", "specificity"), 0.5)

    rounds = Rounds(
        tmp_path,
        RunState("run", clients, 3, "", arch="drcnn", image_size=32, seed=0),
        merge,
        evaluate,
    )
    coordinator = threading.Thread(target=rounds.run, daemon=True)
    coordinator.start()
    server, address = serve(rounds)
    fetched = {}

    def train(name, content):
        if name == "client003":  # equal bytes every round, which must not be taken for a repeat
            return write_weights(tmp_path / f"{name}.h5", 99, LARGE).read_bytes()
        (tmp_path / f"{name}.h5").write_bytes(content)
        moved = [tensor + 1 + len(name) for tensor in read_weights(tmp_path / f"{name}.h5")]
        return write_weights(tmp_path / f"{name}.h5", moved, LARGE).read_bytes()

    def take_part(name, size):
        fetched[name] = seed_client(address, name, size, 3, lambda content: train(name, content))

    threads = [
        threading.Thread(target=take_part, args=(name, 10 * (k + 1)))
        for k, name in enumerate(clients)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        coordinator.join(60)
    finally:
        server.stop(0)
    assert rounds.state.evaluated == 3 and not coordinator.is_alive()
    assert [len(round) for round in merges] == [3, 3, 3]
    assert all(same_bits(merge[2][2], random_tensors(99, LARGE)) for merge in merges)
    assert same_bits(read_weights(path), averaged(merges[-1]))
    assert fetched["client001"] == fetched["client002"] == fetched["client003"]


@pytest.fixture
def old_server(site, monkeypatch):
    """Our client's main() in this process against the seed's server.

    Both train a small network instead of VGG16.
    """
    monkeypatch.chdir(site)
    small = {**todoClient.SEED_TASK, "arch": "drcnn", "image_size": 32}
    monkeypatch.setattr(todoClient, "SEED_TASK", small)
    monkeypatch.setattr(todoClient, "exit_on_signals", lambda *_: None)
    model.configure(0, 1)
    model.save(model.build("drcnn", 32), site / "first.h5")

    def start(**options):
        def merge(uploads):
            ((content, _),) = uploads.values()
            return content

        servicer = SeedServer((site / "first.h5").read_bytes(), 1, merge, **options)
        server, address = servicer.start()
        servers.append(server)
        return servicer, address

    servers = []
    yield start
    for server in servers:
        server.stop(0)


def test_our_client_takes_part_with_an_old_server(old_server, site, capsys):
    servicer, address = old_server()
    assert (
        todoClient.main(
            ["--name", "client001", "--server", address, "--rounds", "2", "--threads", "1"]
        )
        == 0
    )
    assert servicer.round == 2
    assert servicer.content == (site / "client001" / "client_weights.h5").read_bytes()
    assert max(servicer.messages) <= 100_050 and len(servicer.messages) > 2
    assert "the run is over after 2 rounds" in capsys.readouterr().out


def test_the_path_form_and_the_size_go_in_every_chunk(old_server, monkeypatch):
    servicer, address = old_server()
    seen = []
    real = servicer.merge
    servicer.merge = lambda uploads: (
        seen.append({name: size for name, (_, size) in uploads.items()}),
        real(uploads),
    )[1]
    assert (
        todoClient.main(
            ["--name", "client001", "--server", address, "--rounds", "1", "--threads", "1"]
        )
        == 0
    )
    assert seen == [{"client001/client_weights.h5": len(data.read_index("index/worker1.pkl"))}]


def test_an_answer_of_0_means_not_merged_fetch_again(old_server, capsys):
    servicer, address = old_server(answers=[0, 1])
    assert (
        todoClient.main(
            ["--name", "client001", "--server", address, "--rounds", "1", "--threads", "1"]
        )
        == 0
    )
    assert servicer.round == 1
    assert "did not merge (answer 0): fetching again" in capsys.readouterr().out


@pytest.mark.slow
def test_old_and_new_clients_in_one_round(start, site):
    server, address = start_server(start, site, "--rounds", "2", "--image-size", "32")
    new = [
        start("todoClient.py", "--name", name, "--server", address, cwd=site)
        for name in ("client001", "client002")
    ]
    seed_client(address, "client003", 5, 2, lambda content: content, timeout_s=120)
    assert [process.wait() for process in [*new, server]] == [0, 0, 0]
