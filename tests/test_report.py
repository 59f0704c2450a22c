"""report.py: what belongs together is compared, what does not is refused or left out by a sentence.

What the page says is tested in test_page.py.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_data
from PIL import Image

import central
import data
import model
import report
from common import files
from reporting import card as cards
from reporting import metrics


def finished_run(folder):
    """A project folder in which a run of two rounds ended; tests of predict.py use it, too.

    The model tells bright pictures (odd numbers) from dark ones (even). Some with DR are dark and
    some healthy ones are bright: so it finds some DR, misses some, and has false alarms.
    """
    make_data(folder, validation=60)
    val_path = folder / "index" / "val_set.pkl"
    val = data.read_index(val_path)
    brightness = data.healthy(val)
    for number, record in enumerate(val):
        grade = (0, 1, 0, 2, 0, 2, 0, 3, 0, 4, 0, 0)[number % 12]
        if number in (10, 46):  # one chooses the thresholds, one is scored
            grade = 3
        record.update(label=grade, new_label=str(grade == 0))
    data.write_index(val_path, val)
    prepared = {
        "dataset": "synthetic",
        "split": "iid",
        "preprocessing": "synthetic",
        "image_size": 32,
    }
    prepared["worker_hospitals"] = {"worker1": "screening centre"}
    (folder / "index" / "prepared.json").write_text(json.dumps(prepared))
    pixels = np.stack([np.asarray(Image.open(folder / record["dir"])) for record in val])
    model.configure(0)
    network = model.build("drcnn", 32)
    batches = data.TrainingBatches(pixels, brightness, 8, 0, "teacher", augment=False)
    for round_number in range(1, 7):
        model.train(network, batches, round_number, 1, lambda row: None)
    weights = folder / "server" / "server_weight.h5"
    weights.parent.mkdir()
    model.save(network, weights)
    assessed = metrics.assess(model.predict(network, pixels), val)
    state = SimpleNamespace(run="run0", rounds=2, arch="drcnn", image_size=32, seed=0)
    state.weights, state.weights_sha256 = "none", files.sha256_of(weights)
    for number in (1, 2):
        state.counted = {"client001": {"round": number, "num_examples": 8}}
        row = {"round": number, "clients": 1, "num_examples": 8}
        row |= {"loss": 0.7, "accuracy": 0.5, "auc": 0.5}
        card = cards.make(state, row, prepared, files.sha256_of(val_path), assessed)
        cards.publish(weights, card)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Such a folder, with one hospital alone beside the federation."""
    folder = finished_run(tmp_path_factory.mktemp("report") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(model, "train", lambda *arguments, **more: None)  # not what is tested here
        like = ["--like", "server/server_weight.h5", "--out", "alone/client001"]
        assert central.main([*like, "--index", "index/worker1.pkl"]) == 0
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of the finished run, as the current folder."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(model, "train", lambda *arguments, **more: None)
    return tmp_path / "copy"


def loaded(*flags):
    args = report.parse(list(flags))
    return report.load_client(args) if args.client_dir else report.load_server(args)


def refused(capsys, *flags):
    """The one sentence with which report.py ends."""
    assert report.main(list(flags)) == 1
    error = capsys.readouterr().err
    assert " report: error: " in error and error.count("\n") == 1
    return error


def names_of(run):
    return [(other.kind, other.name) for other in run.others]


def test_it_ends_with_the_verdict_the_page_and_the_next_command(here, capsys):
    assert report.main([]) == 0
    _, page, command = capsys.readouterr().out.splitlines()  # the verdict comes first
    assert page.endswith((here / "server" / "report.html").as_uri())
    assert "python3 predict.py --weights server/server_weight.h5" in command
    assert "client001 (screening centre) alone" in (here / "server" / "report.html").read_text()


def test_a_card_keeps_what_was_measured_of_each_round(here):
    card = loaded().federated.card
    assert [row["round"] for row in card["by_round"]] == [1, 2]
    for task, entry in card["tasks"].items():
        assert card["by_round"][-1][task]["auc"] == entry["measured"]["auc"][0]
    card["by_round"] *= 50  # what is too long for the wire is left out there
    assert len(cards.to_wire(card)) <= cards.MAX_WIRE_BYTES
    assert cards.parse(cards.to_wire(card))["by_round"] == []


def test_one_of_another_run_is_left_out_and_the_command_is_named(here):
    card = json.loads((here / "alone/client001/central_weight.json").read_text())
    (here / "alone/client001/central_weight.json").write_text(json.dumps({**card, "run": "old"}))
    run = loaded()
    assert run.others == [] and "of another run" in run.left_out[0]
    [command] = run.commands
    assert central.main(command.removeprefix("python3 central.py ").split()) == 0
    assert len(loaded().others) == 1


def test_where_the_hospitals_are_elsewhere_it_says_what_they_can_do(here):
    shutil.rmtree("alone")
    (here / "index" / "worker1.pkl").unlink()
    [command] = loaded().commands
    assert command.startswith("python3 report.py --client-dir")


def test_the_model_of_all_images_in_one_place_is_shown_beside_it(here):
    shutil.copytree("alone/client001", "central")
    run = loaded()
    assert names_of(run)[-1] == ("central", "all images in one place")


def test_the_best_round_is_a_candidate(here):
    shutil.copy("server/server_weight.h5", "server/best_weight.h5")
    card = json.loads((here / "server" / "server_weight.json").read_text())
    (here / "server" / "best_weight.json").write_text(json.dumps({**card, "round": 1}))
    assert loaded().candidates == []  # the last round is the best
    with open("server/best_weight.h5", "ab") as file:
        file.write(b"x")
    assert "the best round is left out" in loaded().left_out[0]
    changed = {"round": 1, "weights_sha256": files.sha256_of("server/best_weight.h5")}
    (here / "server" / "best_weight.json").write_text(json.dumps({**card, **changed}))
    assert len(loaded().candidates) == 1


def test_a_hospital_gets_the_answer_at_home(here, capsys):
    """Measured on its own patients, at the thresholds that came with the model."""
    (here / "client001").mkdir()
    for name in ("server_weight.h5", "server_weight.json"):
        shutil.copy(here / "server" / name, here / "client001" / name)
    own = data.read_index("index/val_set.pkl")[:12]
    data.write_index("index/val_set.pkl", own)
    alone, tuned = loaded("--client-dir", "client001").commands
    assert " --like " in alone and " --fine-tune " in tuned
    for command in (alone, tuned):
        assert central.main(command.removeprefix("python3 central.py ").split()) == 0
    run = loaded("--client-dir", "client001")
    assert [kind for kind, _ in names_of(run)] == ["alone", "fine-tuned"] and run.commands == []
    assert run.others[1].card["round"] == 3  # one more, at that round's learning rate
    result = cards.read("client001/server_weight.h5")
    for task, entry in run.federated.card["tasks"].items():
        assert entry["threshold"] == result["tasks"][task]["threshold"]
    assert run.federated.card["num_images"] == len(own)
    assert run.federated.card["warning"] == ""  # too few patients to warn of the model
    assert report.main(["--client-dir", "client001"]) == 0
    assert "this hospital alone" in (here / "client001" / "report.html").read_text()


def test_weights_card_and_validation_set_belong_together(here, capsys):
    shutil.copy("index/worker1.pkl", "index/val_set.pkl")
    assert "is not the validation set that this run was scored on" in refused(capsys)
    with open("server/server_weight.h5", "ab") as file:
        file.write(b"x")
    assert "describes other weights than" in refused(capsys)
    (here / "server" / "server_weight.json").unlink()
    assert "server_weight.json, the card of" in refused(capsys)


def test_a_model_that_answers_nan_is_no_model(here, capsys, monkeypatch):
    monkeypatch.setattr(model, "predict", lambda network, images: np.full(len(images), np.nan))
    assert "must not be used: it answers NaN for 60 of 60 images" in refused(capsys)


def test_a_card_with_other_rounds_than_ours_is_refused(here, capsys):
    path = here / "server" / "server_weight.json"
    card = json.loads(path.read_text())
    for by_round in ("x", [1], [{"round": 1}]):
        path.write_text(json.dumps({**card, "by_round": by_round}))
        assert "by_round" in refused(capsys)


def test_what_is_missing_is_one_sentence(here, capsys):
    for table in ("series,round\ncentral,1\n", "round,client\n1,x,3\n", "round,client\none,x\n"):
        (here / "server" / "clients.csv").write_text(table)
        assert "clients.csv is no table of a run" in refused(capsys)
    assert "elsewhere/server_weight.h5 is missing" in refused(capsys, "--server-dir", "elsewhere")
    assert "nothing/val_set.pkl is missing" in refused(capsys, "--index-dir", "nothing")


def test_a_table_with_empty_cells(tmp_path):
    (tmp_path / "clients.csv").write_text("round,client,auc,loss\n1,007,,\n2,x,,0.5\n3\n")
    rows = report.read_table(tmp_path / "clients.csv", "round", "client")
    assert [(row["client"], row["auc"], row["loss"]) for row in rows] == [
        ("007", None, None),
        ("x", None, 0.5),
        ("", None, None),
    ]
    assert report.read_table(tmp_path / "none.csv") == []
