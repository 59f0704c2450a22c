"""A client or a server of the thesis demo takes part (DESIGN 2, "the old peer")."""

from conftest import CLIENTS, Call, new_run, random_tensors, read_weights, same_bits, write_weights
from seed_peer import SeedServer, seed_client
from serving import serve

import data
import todoClient

LARGE = [("conv", (3, 3, 64, 64)), ("dense", (300, 300)), ("dense", (300,))]  # several messages
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


def test_our_client_takes_part_with_an_old_server(client_main, tmp_path, monkeypatch):
    """It counts the rounds itself; name as a path and size go in every message, which is small."""
    monkeypatch.setattr(todoClient, "TASK_OF_2020", {**todoClient.TASK_OF_2020, "image_size": 32})
    first = write_weights(tmp_path / "first.h5", 1, LARGE, root="model_weights")
    old = SeedServer(first.read_bytes(), answers=[0, 1])  # 0: not merged
    server, address = old.start()
    code, said = client_main("--server", address, "--rounds", "2")
    assert code == 0 and "did not merge (answer 0): fetching again" in said
    assert "its result is client001/server_weight.h5, without a model card" in said
    content = (tmp_path / "client001" / "client_weights.h5").read_bytes()
    size = len(data.read_index("index/worker1.pkl"))
    assert len(old.uploads) == 2
    assert old.uploads[1] == ("client001/client_weights.h5", content, size)
    assert not old.is_told and max(old.messages) <= 100_050 and len(old.messages) > 6
    # started again after its rounds, it trains no more; with more of them it goes on
    for rounds in (2, 3):
        assert client_main("--server", address, "--rounds", str(rounds))[0] == 0
        assert len(old.uploads) == rounds
    old.answers = [None]  # it may go on behind its last round: it is waited for
    assert client_main("--server", address, "--rounds", "4")[0] == 4
    server.stop(0)
