"""A client or a server of the thesis demo takes part (DESIGN 2, "the old peer")."""

import pytest
from conftest import (
    Call,
    new_run,
    random_tensors,
    read_weights,
    same_bits,
    start_server,
    write_weights,
)
from hostile import many_names, one_text_many_times
from seed_peer import SeedServer, seed_client
from serving import serve

import data
import todoClient
from federation import weights

LARGE = [("conv", (3, 3, 64, 64)), ("dense", (300, 300)), ("dense", (300,))]  # several messages
CLIENTS = ["client001", "client002", "client003"]
SIZES = [10, 20, 30]


# --- three clients of 2020 and our server --------------------------------------------------------


def test_three_old_clients_complete_three_rounds_one_changing_nothing(make_run, tmp_path):
    run = make_run(clients=CLIENTS, rounds=3)
    run.stop()
    new_run(CLIENTS, 3, write_weights(run.weights, 0, LARGE)).save(run.folder / "state.json")
    run.start()
    server, address = serve(run.rounds)
    merges = []

    def merge(paths, sizes):
        merges.append((sizes, [read_weights(path) for path in paths]))
        return run.average(paths, sizes)

    run.merge = merge

    def train(name, content):
        path = tmp_path / f"{name}.h5"
        if name == "client003":  # equal bytes every round, which must not be taken for a repeat
            return write_weights(path, 99, LARGE).read_bytes()
        path.write_bytes(content)
        moved = [tensor + 1 + len(name) for tensor in read_weights(path)]
        return write_weights(path, moved, LARGE, root="model_weights").read_bytes()

    def take_part(name, size):
        return Call(seed_client, address, name, size, 3, lambda content: train(name, content))

    try:
        calls = [take_part(*each) for each in zip(CLIENTS, SIZES, strict=True)]
        fetched = [call.result() for call in calls]
        run.coordinator.result()
        run.rounds.wait_until_all_done(30)  # they have their last answer
    finally:
        server.stop(0)
    assert run.rounds.state.evaluated == 3 and run.rounds.done_clients == set(CLIENTS)
    assert [sizes for sizes, _ in merges] == [SIZES] * 3
    assert all(same_bits(tensors[2], random_tensors(99, LARGE)) for _, tensors in merges)
    assert fetched[0] == fetched[1] == fetched[2]
    assert len(set(fetched[0])) == 3 and fetched[0][0] != run.weights.read_bytes()


# --- our client and the server of 2020 -----------------------------------------------------------


@pytest.fixture
def old_server(client_main, tmp_path, monkeypatch):
    """old_server(**options) -> (SeedServer, the address), for one client of ours."""
    monkeypatch.setattr(todoClient, "SEED_TASK", {**todoClient.SEED_TASK, "image_size": 32})
    path = write_weights(tmp_path / "first.h5", 1, LARGE, root="model_weights")
    servers = []

    def start(**options):
        def merge(uploads):
            ((content, _),) = uploads.values()
            return content

        servicer = SeedServer(path.read_bytes(), 1, merge, **options)
        server, address = servicer.start()
        servers.append(server)
        return servicer, address

    yield start
    for server in servers:
        server.stop(0)


def test_our_client_takes_part_with_an_old_server(old_server, client_main, tmp_path):
    """It counts the rounds itself; name as a path and size go in every message, which is small."""
    servicer, address = old_server(answers=[0, 1])  # 0: not merged
    seen = []
    merge = servicer.merge
    servicer.merge = lambda uploads: seen.append(dict(uploads)) or merge(uploads)
    code, said = client_main("--server", address, "--rounds", "2")
    assert code == 0 and servicer.round == 2
    assert "did not merge (answer 0): fetching again" in said
    assert "its result is client001/server_weight.h5, without a model card" in said
    content = (tmp_path / "client001" / "client_weights.h5").read_bytes()
    size = len(data.read_index("index/worker1.pkl"))
    assert seen[1] == {"client001/client_weights.h5": (content, size)} and len(seen) == 2
    assert max(servicer.messages) <= 100_050 and len(servicer.messages) > 6
    # started again after its rounds, it does not ask a server of 2020 for calls that it has not
    code, said = client_main("--server", address, "--rounds", "2")
    assert code == 0 and "not told" not in said and servicer.round == 2
    # and with more of them it goes on
    code, said = client_main("--server", address, "--rounds", "3")
    assert code == 0 and servicer.round == 3


@pytest.mark.parametrize("hostile", [one_text_many_times, many_names])
def test_a_hostile_file_of_a_server_is_not_opened_by_the_client(
    old_server, client_main, monkeypatch, tmp_path, hostile
):
    """A process that bounds itself reads it: in the client it would take gigabytes or hours."""
    servicer, address = old_server()
    hostile(tmp_path / "hostile.h5")
    servicer.content = (tmp_path / "hostile.h5").read_bytes()
    monkeypatch.setattr(weights.h5py, "File", None)
    code, said = client_main("--server", address)
    assert code == 1 and "the server's weights cannot be used" in said and len(said) < 1000
    assert not list((tmp_path / "client001").glob("*.h5"))  # kept for nothing


@pytest.mark.slow
def test_old_and_new_clients_in_one_round(start, site):
    server, address = start_server(start, site, "--rounds", "2", "--image-size", "32")
    new = [
        start("todoClient.py", "--name", name, "--server", address, cwd=site)
        for name in ("client001", "client002")
    ]
    seed_client(address, "client003", 5, 2, lambda content: content, timeout_s=120)
    assert [process.wait() for process in [*new, server]] == [0, 0, 0]
