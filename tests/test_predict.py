"""predict.py: new photographs are prepared as the training images were; a bad one does not stop the others."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_report import finished_run

import model
import predict
from common import files
from preparation import fundus, photos


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("predict") / "project")


@pytest.fixture
def score(project, monkeypatch, capsys):
    """score(preprocessing, path ...) -> (exit code, {path: score}, the output), run in the project's folder."""
    monkeypatch.chdir(project)

    def run(preprocessing, *paths):
        (project / "index" / "prepared.json").write_text(
            json.dumps({"preprocessing": preprocessing, "image_size": 32})
        )
        code = predict.main([str(path) for path in paths])
        said = capsys.readouterr()
        return code, dict(re.findall(r"^(.+?)  DR score (\d\.\d{3})", said.out, re.M)), said

    return run


def by_hand(pixels):
    network = model.build("drcnn", 32)
    model.load(network, "server/server_weight.h5")
    return f"{1 - model.predict(network, pixels[None])[0]:.3f}"


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs") / "eye.png"
    Image.fromarray(fundus.draw(3, np.random.default_rng(5), 150)[0]).save(path)
    return path


def test_a_photograph_is_prepared_as_in_training(score, photograph):
    code, scores, said = score("graham", photograph)
    pixels = photos.preprocess(photos.open_image(photograph), 32)
    assert (code, scores) == (0, {str(photograph): by_hand(pixels)})
    assert by_hand(pixels) != by_hand(
        np.asarray(Image.open(photograph).resize((32, 32)))
    )  # or this test could not fail
    assert "drawn" not in said.out
    assert said.out.splitlines()[-1].startswith("This is no medical device")


def test_a_prepared_picture_is_not_prepared_again(score):
    _, scores, _ = score("graham", "preprocessed/0003.png")
    assert scores == {
        "preprocessed/0003.png": by_hand(np.asarray(Image.open("preprocessed/0003.png")))
    }


def test_a_model_of_drawn_images_says_so_and_only_resizes(score, photograph):
    code, scores, said = score("drawn", photograph, "preprocessed/0003.png")
    assert code == 0
    assert scores[str(photograph)] == by_hand(np.asarray(Image.open(photograph).resize((32, 32))))
    lines = said.out.splitlines()
    assert "was trained on drawn images" in lines[0] and "drawn" not in lines[1]


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
    errors = said.err.splitlines()
    assert len(errors) == 3 and "Traceback" not in said.err
    assert (
        "notes.jpg cannot be read" in errors[0]
        and "none.jpg is missing" in errors[1]
        and "black.png: nothing" in errors[2]
    )
    assert "medical device" in said.out


def test_weights_that_are_none_are_refused_by_name(score, tmp_path):
    (tmp_path / "other.h5").write_bytes(b"something else")
    code, scores, said = score("drawn", "preprocessed/0003.png", "--weights", tmp_path / "other.h5")
    assert (code, scores) == (1, {}) and f"{tmp_path / 'other.h5'} cannot be used" in said.err
    code, _, said = score("drawn", "preprocessed/0003.png", "--weights", "absent.h5")
    assert code == 1 and "absent.h5 is missing" in said.err
    shutil.copy("server/server_weight.h5", tmp_path / "whole.keras")
    code, _, said = score("drawn", "preprocessed/0003.png", "--weights", tmp_path / "whole.keras")
    assert code == 1 and re.fullmatch(
        "predict: error: .*whole.keras cannot be used: Keras chooses the format by the name.*\n",
        said.err,
    )


def test_a_model_of_no_round_is_refused(score):
    state = files.load_state("server/state.json")
    files.save_state("server/state.json", {**state, "round": 1, "history": []})
    code, scores, said = score("drawn", "preprocessed/0003.png")
    assert (code, scores) == (
        1,
        {},
    ) and "server_weight.h5 is not trained yet: no round of its run is over" in said.err
    code, scores, _ = score(
        "drawn", "preprocessed/0003.png", "--weights", "./server/server_weight.h5"
    )  # as the user says
    assert code == 0 and len(scores) == 1
    files.save_state("server/state.json", state)


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
