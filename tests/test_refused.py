"""Refused is not for ever: a rejected upload is trained again once, a late client learns the end.

Real servers and clients; only TensorFlow is left out, but where a training is to fail.
"""

import json
import re
import shutil
import signal

import pytest
from conftest import client_script, holding, server_script, start_server

NAN_UPLOADS = """
import numpy as np
import standin
BAD_TRAININGS = {bad_trainings}
whole, trained = standin.tensors, []
def tensors(network):
    trained.append(network)
    arrays = whole(network)
    if len(trained) <= BAD_TRAININGS:
        bad = np.inf if ALTERNATE and len(trained) % 2 == 0 else np.nan
        arrays[0] = np.full_like(arrays[0], bad)
    return arrays
standin.tensors = tensors
sys.modules["model"] = standin
import todoClient
todoClient.FIRST_PAUSE_S = todoClient.LONGEST_PAUSE_S = 0.05
class Anything:  # as if this client had not looked itself: every number is finite to it
    def __getattr__(self, name):
        return getattr(np, name)
    def isfinite(self, numbers):
        return np.ones(np.shape(numbers), bool)
todoClient.weights.np = Anything()
"""


def bad_client(site, bad_trainings, alternate=False):
    """todoClient.py whose first trainings end in NaN, and which does not notice."""
    patch = NAN_UPLOADS.format(bad_trainings=bad_trainings)
    return holding(site, "todoClient", f"ALTERNATE = {alternate}", patch)


def state_of(site, client="client001"):
    return json.loads((site / client / "state.json").read_text())


def test_an_upload_that_is_rejected_once_is_trained_again_and_counts(start, begun):
    site = begun(clients=["client001"], rounds=2)
    server, address = start_server(start, site, script=server_script(site))
    client = start(bad_client(site, 1), "--name", "client001", "--server", address, cwd=site)
    assert [client.wait(), server.wait()] == [0, 0], client.output
    assert client.output.count("training now") == 3
    [line] = [line for line in client.lines if "upload rejected" in line]
    assert re.search("nan: only finite numbers .*; these weights are dropped, training again", line)
    assert state_of(site)["rejections"] == []


@pytest.mark.parametrize(("alternate", "uploads"), [(False, 2), (True, 3)])
def test_rejected_again_it_ends_with_1_says_where_to_look_and_may_be_started_again(
    start, begun, alternate, uploads
):
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=server_script(site))
    arguments = ["--name", "client001", "--server", address]
    client = start(bad_client(site, 99, alternate), *arguments, cwd=site)
    assert client.wait() == 1, client.output
    assert client.output.count("training now") == uploads
    assert f"error: the server rejected {uploads} uploads of this round" in client.lines[-1]
    assert "Look at the images in index/worker1.pkl" in client.lines[-1]
    assert server.output.count("only finite numbers") == uploads
    again = start(client_script(site), *arguments, cwd=site)
    assert [again.wait(), server.wait()] == [0, 0], again.output


def test_a_client_killed_between_two_rejections_counts_both(start, begun):
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=server_script(site))
    arguments = ["--name", "client001", "--server", address]
    slow = bad_client(site, 99).read_text().replace("import todoClient", SLOW_SECOND, 1)
    (site / "slow.py").write_text(slow)
    client = start(site / "slow.py", *arguments, cwd=site)
    client.wait_for("upload rejected")
    client.wait_for("training for long")
    client.kill()
    client = start(bad_client(site, 99), *arguments, cwd=site)
    assert client.wait() == 1, client.output
    assert client.output.count("training now") == 1
    assert "the server rejected 2 uploads" in client.lines[-1]


SLOW_SECOND = """
real_train = standin.train
def train(*arguments, **options):
    if trained:
        print("training for long", flush=True)
        time.sleep(1000)
    return real_train(*arguments, **options)
standin.train = train
import todoClient"""


# --- pictures of another kind ---------------------------------------------------------------------


def test_pictures_of_another_kind_than_the_servers_are_refused(start, begun):
    """Nothing else would say that one hospital's are prepared otherwise."""
    site = begun(clients=["client001", "client002"], rounds=1)
    for name, kind in (("of-server", "colour"), ("one", "graham"), ("two", "colour")):
        shutil.copytree(site / "index", site / name)
        (site / name / "prepared.json").write_text(json.dumps({"preprocessing": kind}))
    flags = ["--index-dir", "of-server"]
    server, address = start_server(start, site, *flags, script=server_script(site))

    def client(name, index):
        arguments = ["--name", name, "--server", address, "--index", index]
        return start(client_script(site), *arguments, cwd=site)

    refused = client("client001", "one/worker1.pkl")
    assert refused.wait() == 1
    assert "are of the kind 'graham' (one/prepared.json)" in refused.lines[-1]
    assert "of the kind 'colour'" in refused.lines[-1] and "--preprocessing" in refused.lines[-1]
    # the same kind, and one of which nothing is known
    others = [client("client002", "two/worker1.pkl"), client("client001", "index/worker1.pkl")]
    assert [process.wait() for process in [*others, server]] == [0, 0, 0]


# --- a straggler ---------------------------------------------------------------------------------


LIMIT = ["--round-timeout", "12", "--min-clients", "1"]


@pytest.fixture
def straggler(start, begun):
    """(site, server, its address, client002): the last round went on without client002."""
    site = begun(rounds=1)
    script = server_script(site)
    server, address = start_server(start, site, *LIMIT, script=script)
    late = start(client_script(site), "--name", "client002", "--server", address, cwd=site)
    late.wait_for("training now")
    late.signal(signal.SIGSTOP)
    arguments = ["--name", "client001", "--server", address]
    assert start(client_script(site), *arguments, cwd=site).wait() == 0
    server.wait_for("the run is over")
    return site, server, address, late


@pytest.mark.slow
@pytest.mark.parametrize("started_again", [False, True])
def test_a_straggler_that_finds_the_server_learns_that_the_run_is_over(
    straggler, start, started_again
):
    site, server, address, late = straggler
    if started_again:
        server.kill()
        port = address.rpartition(":")[2]
        server, _ = start_server(start, site, *LIMIT, port=port, script=server_script(site))
    late.signal(signal.SIGCONT)
    assert late.wait() == 0, late.output
    assert "round 1, which is over" in late.output
    assert (
        "the run is over after 1 rounds; its result is client002/server_weight.h5"
        in (late.lines[-1])
    )
    assert server.wait() == 0


def test_a_straggler_that_finds_no_server_ends_with_4_and_says_that_the_run_may_be_over(
    start, begun
):
    site = begun(rounds=1)
    server, address = start_server(start, site)
    arguments = ["--name", "client001", "--server", address, "--give-up-after", "1"]
    client = start(client_script(site, training_s=2), *arguments, cwd=site)
    client.wait_for("training now")
    server.kill()
    assert client.wait() == 4, client.output
    assert "round 1 was the last, so the run may be over" in client.lines[-1]


# --- training that ends in NaN -------------------------------------------------------------------


@pytest.mark.parametrize("noticed_by", ["the loss", "the weights"])
def test_a_training_that_is_not_finite_is_one_sentence_and_is_not_kept(start, begun, noticed_by):
    site = begun(clients=["client001"], rounds=1)
    server, address = start_server(start, site, script=server_script(site))
    patch = NAN_UPLOADS.format(bad_trainings=99).replace("todoClient.weights.np =", "nobody =")
    if noticed_by == "the loss":
        patch += NAN_LOSS
    script = holding(site, "todoClient", "ALTERNATE = False", patch)
    arguments = ["--name", "client001", "--server", address]
    for _ in range(2):  # started again, it trains again
        client = start(script, *arguments, "--epochs", "4", cwd=site)
        assert client.wait() == 1, client.output
        assert client.output.count("training now") == 1 and "Traceback" not in client.output
        assert re.search(EXPECTED[noticed_by], client.lines[-1]), client.lines[-1]
        assert "try a smaller learning rate" in client.lines[-1]
        assert "delivered" not in server.output
    good = start(client_script(site), *arguments, cwd=site)
    assert [good.wait(), server.wait()] == [0, 0], good.output


NAN_LOSS = """
def train(network, batches, round_number, epochs, report, progress=None):
    print("training now", flush=True)
    row = {"round": 1, "accuracy": 0.5, "num_examples": 4, "seconds": 1.0}
    report({**row, "epoch": 1, "loss": 0.5})
    report({**row, "epoch": 2, "loss": float("nan")})
standin.train = train
"""
EXPECTED = {
    "the loss": "error: round 1/1, epoch 2: the loss is nan. .*nothing of it is kept",
    "the weights": "error: round 1/1, epoch 4: layer 'conv1' .*nan.*nothing of it is kept",
}


@pytest.mark.slow
def test_a_real_network_whose_learning_rate_is_far_too_large(start, site):
    server, address = start_server(start, site, "--rounds", "1", "--image-size", "32")
    patch = "import model\nmodel.learning_rate = lambda *_: 1e30"
    script = holding(site, "todoClient", patch)
    client = start(script, "--name", "client001", "--server", address, "--epochs", "3", cwd=site)
    assert client.wait(120) == 1, client.output
    assert "finite" in client.lines[-1] and "Traceback" not in client.output
    assert "delivered" not in server.output
