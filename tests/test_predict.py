"""predict.py: photographs are prepared as in training; a bad one does not stop the others."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_report import finished_run

import model
import predict
from common import files
from preparation import photos, synthetic
from reporting import card as cards


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("predict") / "project")


@pytest.fixture
def score(project, monkeypatch, capsys):
    """score(preprocessing, argument ...) -> (exit code, {path: score}, the output).

    Run in the project's folder; the model's card says `preprocessing`.
    """
    monkeypatch.chdir(project)
    path = project / "server" / "server_weight.json"
    original = path.read_text()
    card = json.loads(original)

    def run(preprocessing, *arguments):
        path.write_text(json.dumps({**card, "preprocessing": preprocessing}))
        code = predict.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, dict(re.findall(r"^(.+?)  DR score (\d\.\d{3})", said.out, re.M)), said

    yield run
    path.write_text(original)


def by_hand(pixels):
    network = model.build("drcnn", 32)
    model.load(network, "server/server_weight.h5")
    return f"{1 - model.predict(network, pixels[None])[0]:.3f}"


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs") / "eye.png"
    Image.fromarray(synthetic.draw(3, np.random.default_rng(5), 150)[0]).save(path)
    return path


def test_a_photograph_is_prepared_as_in_training(score, photograph):
    code, scores, said = score("graham", photograph)
    pixels = photos.prepare_photograph(photograph, 32)[0]
    assert (code, scores) == (0, {str(photograph): by_hand(pixels)})
    _, in_colour, _ = score("colour", photograph)
    pixels_in_colour = photos.prepare_photograph(photograph, 32, "colour")[0]
    assert in_colour == {str(photograph): by_hand(pixels_in_colour)} != scores
    # or this test could not fail
    assert by_hand(pixels) != by_hand(np.asarray(Image.open(photograph).resize((32, 32))))
    assert "drawn" not in said.out + said.err
    assert said.err.splitlines()[-1].endswith(
        "no medical device: decide nothing about a patient by these scores"
    )


def test_it_goes_by_the_card_and_not_by_what_lies_in_index_now(score, photograph, project):
    made = project / "index" / "prepared.json"
    original = made.read_text()
    _, before, said = score("drawn", photograph)
    assert said.err.count("was trained on drawn images") == 1
    made.write_text(json.dumps({"preprocessing": "graham", "image_size": 16}))
    _, after, said = score("drawn", photograph)
    assert before == after and said.err.count("was trained on drawn images") == 1
    made.write_text(original)


def test_two_files_are_enough(project, photograph, tmp_path, monkeypatch, capsys):
    for name in ("server_weight.h5", "server_weight.json"):
        shutil.copy(project / "server" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert predict.main(["--weights", "server_weight.h5", str(photograph)]) == 0
    assert f"{photograph}  DR score" in capsys.readouterr().out


def test_the_verdict_is_at_the_threshold_of_the_card(score, project):
    path = project / "server" / "server_weight.json"
    card = json.loads(path.read_text())
    pictures = sorted((project / "preprocessed").glob("*.png"))[-20:]
    _, scores, said = score("drawn", *pictures)
    threshold = card["tasks"]["referable DR"]["threshold"]
    lines = dict(re.findall(r"^(.+?)  DR score \S+  (.+)$", said.out, re.M))
    assert set(lines.values()) == {"referable DR", "no referable DR"}
    for picture, verdict in lines.items():
        printed = float(scores[picture])
        if abs(printed - threshold) > 0.0005:  # as it is printed, a score is rounded
            assert (verdict == "referable DR") == (printed > threshold)
    card["tasks"]["referable DR"]["threshold"] = None
    card["warning"] = "it finds nobody"
    path.write_text(json.dumps(card))
    assert predict.main([str(pictures[0])]) == 0


def test_a_model_that_must_not_be_used_says_so_once_and_gives_no_verdict(
    project, monkeypatch, capsys
):
    monkeypatch.chdir(project)
    path = project / "server" / "server_weight.json"
    original = path.read_text()
    card = json.loads(original)
    card["warning"] = "it finds nobody"
    card["tasks"]["referable DR"]["threshold"] = None
    path.write_text(json.dumps(card))
    pictures = ["preprocessed/0003.png", "preprocessed/0004.png"]
    assert predict.main(pictures) == 0
    said = capsys.readouterr()
    assert said.err.count("must not be used: it finds nobody") == 1
    assert len(re.findall(r"DR score \d\.\d{3}$", said.out, re.M)) == 2
    path.write_text(original)


def test_a_prepared_picture_is_not_prepared_again(score):
    _, scores, _ = score("graham", "preprocessed/0003.png")
    assert scores == {
        "preprocessed/0003.png": by_hand(np.asarray(Image.open("preprocessed/0003.png")))
    }


def test_images_of_another_kind_are_said_once(score, photograph):
    code, scores, said = score(
        "drawn", photograph, "preprocessed/0003.png", "preprocessed/0004.png"
    )
    assert code == 0
    assert scores[str(photograph)] == by_hand(np.asarray(Image.open(photograph).resize((32, 32))))
    assert said.err.count("was trained on drawn images") == 1 and "drawn" not in said.out
    _, _, said = score("graham", "preprocessed/0003.png", "preprocessed/0004.png")
    assert said.err.count("the pictures in preprocessed/ were made by 'drawn'") == 1


def test_a_bad_image_gets_its_sentence_and_the_others_their_scores(score, tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    code, scores, said = score(
        "graham",
        tmp_path / "notes.jpg",
        "none.jpg",
        tmp_path / "black.png",
        "preprocessed/0003.png",
    )
    assert code == 1 and list(scores) == ["preprocessed/0003.png"]
    errors = [line for line in said.err.splitlines() if "error: " in line]
    assert len(errors) == 3 and "Traceback" not in said.err
    assert "notes.jpg cannot be read" in errors[0]
    assert "none.jpg is missing" in errors[1]
    assert "black.png: nothing" in errors[2]
    assert "medical device" in said.err


@pytest.fixture
def folder(tmp_path, photograph):
    """Four images in a folder and one below it, and two files that are none."""
    (tmp_path / "eyes" / "more").mkdir(parents=True)
    for name in ("a_left.jpg", "a_right.JPG", "b_left.png", "more/c_left.tif"):
        Image.open(photograph).save(tmp_path / "eyes" / name)
    (tmp_path / "eyes" / "broken_left.png").write_text("no image")
    (tmp_path / "eyes" / "._a_left.jpg").write_text("what macOS writes beside a file")
    (tmp_path / "eyes" / "labels.csv").write_text("image,label\n")
    return tmp_path / "eyes"


def test_folders_and_patterns(score, folder):
    def names(*arguments):
        return [Path(path).name for path in score("graham", *arguments)[1]]

    all_four = ["a_left.jpg", "a_right.JPG", "b_left.png", "c_left.tif"]
    assert names(folder) == all_four
    assert names(folder / "*_left.???") == ["a_left.jpg", "b_left.png"]
    assert names(folder / "**" / "*_left.???") == ["a_left.jpg", "b_left.png", "c_left.tif"]
    assert names(folder / "a_left.jpg", folder) == all_four  # each once
    (folder / "[1].png").write_bytes((folder / "b_left.png").read_bytes())
    assert names(folder / "[1].png") == ["[1].png"]  # a file of that name is no pattern
    code, scores, said = score("graham", folder / "*.bmp")
    assert (code, scores) == (1, {}) and f"no file matches {folder / '*.bmp'}" in said.err
    (folder / "empty").mkdir()
    code, scores, said = score("graham", folder / "empty")
    assert (code, scores) == (1, {}) and f"{folder / 'empty'} has no image" in said.err


def test_csv_has_a_row_for_each_image(score, folder, tmp_path):
    code, scores, said = score("graham", "--csv", tmp_path / "scores.csv", folder)
    assert code == 1 and scores == {}  # the scores are in the file
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "score", "verdict", "reason"]
    assert len(rows) == 5
    for row in rows:
        if "broken" in row["path"]:
            assert (row["score"], row["verdict"]) == ("", "") and "cannot be read" in row["reason"]
        else:
            assert 0 <= float(row["score"]) <= 1 and row["reason"] == ""
            assert row["verdict"] in ("referable DR", "no referable DR")
    assert "scores.csv: 5 images: " in said.out and "1 not readable" in said.out
    code, _, said = score("graham", "--csv", tmp_path / "none" / "scores.csv", folder)
    assert code == 1 and "none/scores.csv cannot be written" in said.err


def test_many_photographs_are_the_same_scores_as_one(score, folder, monkeypatch):
    monkeypatch.setattr(predict, "FEWEST_FOR_PROCESSES", 3)
    monkeypatch.setattr(predict, "AT_ONCE", 2)
    _, together, _ = score("graham", folder)
    single = {}
    for path in together:
        single.update(score("graham", path)[1])
    assert together == single and len(together) == 4


def test_a_progress_bar_only_where_the_scores_do_not_show_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = predict.Progress(4, writes_file=True)
    shown.show(2)
    shown.show(4)
    said = capsys.readouterr().err
    assert "] 2 of 4, " in said and said.endswith("a second\n") and said.count("\r") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    predict.Progress(4, writes_file=True).show(4)
    assert capsys.readouterr().err == ""


def test_weights_that_are_none_are_refused_by_name(score, tmp_path):
    def card_for(name):
        card = json.loads(Path("server/server_weight.json").read_text())
        card["weights_sha256"] = files.sha256_of(tmp_path / name)
        cards.publish(tmp_path / name, card)

    (tmp_path / "other.h5").write_bytes(b"something else")
    card_for("other.h5")
    code, scores, said = score("drawn", "preprocessed/0003.png", "--weights", tmp_path / "other.h5")
    assert (code, scores) == (1, {}) and f"{tmp_path / 'other.h5'} cannot be used" in said.err
    code, _, said = score("drawn", "preprocessed/0003.png", "--weights", "absent.h5")
    assert code == 1 and "absent.h5 is missing" in said.err
    shutil.copy("server/server_weight.h5", tmp_path / "whole.keras")
    card_for("whole.keras")
    code, _, said = score("drawn", "preprocessed/0003.png", "--weights", tmp_path / "whole.keras")
    assert code == 1 and "whole.keras cannot be used: Keras chooses the format by" in said.err


def test_weights_without_their_card_are_refused(score, project, tmp_path):
    shutil.copy("server/server_weight.h5", tmp_path / "lonely.h5")
    code, scores, said = score(
        "drawn", "--weights", tmp_path / "lonely.h5", "preprocessed/0003.png"
    )
    assert (code, scores) == (1, {})
    assert f"{tmp_path / 'lonely.json'}, the card of {tmp_path / 'lonely.h5'}, is mi" in said.err
    shutil.copy("server/server_weight.json", tmp_path / "lonely.json")
    with open(tmp_path / "lonely.h5", "ab") as file:
        file.write(b"x")
    code, scores, said = score(
        "drawn", "--weights", tmp_path / "lonely.h5", "preprocessed/0003.png"
    )
    assert (code, scores) == (1, {}) and "describes other weights than" in said.err
    (tmp_path / "lonely.json").write_text("[]")
    code, scores, said = score(
        "drawn", "--weights", tmp_path / "lonely.h5", "preprocessed/0003.png"
    )
    assert (code, scores) == (1, {}) and "lonely.json is no model card: it holds a list" in said.err


def test_a_name_that_is_no_text_is_printed_all_the_same(score, tmp_path):
    path = os.fsdecode(bytes(tmp_path / "eye") + b"\xe5.png")
    shutil.copy("preprocessed/0003.png", path)
    shown = subprocess.run(
        [sys.executable, ROOT / "predict.py", path, "preprocessed/0003.png"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert (
        shown.returncode == 0
        and shown.stdout.count("DR score") == 2
        and r"eye\udce5.png" in shown.stdout
    ), shown.stderr
