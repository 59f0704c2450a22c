"""launch.py: the flags of run_local.sh and compare.sh, told before anything is started."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import launch
import model
from preparation import datasets

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
SCRIPTS = {
    "prepare": "prepare.py",
    "server": "todoServer.py",
    "client": "todoClient.py",
    "central": "central.py",
}


def help_of(script, *words):
    shown = subprocess.run(
        [sys.executable, script, *words, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    return set(re.findall(r"--[a-z][a-z-]+", shown.stdout)) - {"--help"}


@pytest.fixture(scope="module")
def script_flags():
    """{"prepare": {"--dataset", ...}, ...}, as each script's --help names them."""
    return {name: help_of(script) for name, script in SCRIPTS.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_goes_to_scripts_that_know_it(script_flags, name):
    passed_on = {flag for flag, scripts, _ in launch.FLAGS if name in scripts}
    assert passed_on and passed_on <= script_flags[name]


def test_a_flag_goes_to_every_script_that_knows_it(script_flags):
    """Except where only the launcher's word counts: --rounds of a client is for servers of 2020."""
    for flag, scripts, _ in launch.FLAGS:
        knowing = {name for name, flags in script_flags.items() if flag in flags}
        if flag == "--rounds":
            knowing.remove("client")
        assert set(scripts) == knowing, flag


def test_networks_and_data_sets_are_those_of_the_scripts():
    assert launch.IMAGE_SIZES == {name: arch.image_size for name, arch in model.ARCHS.items()}
    assert launch.PRETRAINED == [name for name, arch in model.ARCHS.items() if arch.features]
    assert launch.DATASETS == ["synthetic", *datasets.NAMES]


@pytest.mark.parametrize("command", ["run", "compare"])
def test_both_commands_know_what_changes_the_training(script_flags, command):
    """All flags of central.py, but for its files and what launch.py gives it by itself."""
    about_files = {"--index", "--index-dir", "--out", "--threads"}
    about_files |= {"--like", "--fine-tune", "--score-every"}
    assert script_flags["central"] - about_files <= help_of("launch.py", command)


def test_flags_go_to_the_scripts_that_know_them():
    command, flags = launch.parse(["run", "--seed", "0", "--freeze-base", "--arch", "vgg16"])
    assert command == "run_local"
    assert launch.flags_for("prepare", flags) == ["--image-size", "224", "--seed", "0"]
    server = ["--image-size", "224", "--seed", "0", "--arch", "vgg16"]
    assert launch.flags_for("server", flags) == server
    drawn = ["--epochs", "2"]  # of the drawn images, where the user says nothing
    assert launch.flags_for("client", flags) == [*drawn, "--seed", "0", "--freeze-base"]
    command, flags = launch.parse(["compare"])
    assert command == "compare" and flags == {"--epochs": 2}
    _, flags = launch.parse(["run", "--epochs", "1"])
    assert launch.flags_for("client", flags) == ["--epochs", "1"]
    _, flags = launch.parse(["run", "--dataset", "folder", "--source", "."])
    assert launch.flags_for("client", flags) == []


def test_central_training_freezes_what_the_clients_freeze():
    """A server that begins from ImageNet with lite0 tells its clients to."""
    _, flags = launch.parse(["run", "--arch", "lite0"])
    assert launch.flags_for("server", flags)[-2:] == ["--weights", "imagenet"]
    assert launch.flags_for("client", flags) == ["--epochs", "2"]
    assert launch.central_flags(flags)[-2:] == ["--freeze-base", "--no-augmentation"]
    _, flags = launch.parse(["run", "--arch", "lite0", "--no-freeze-base"])
    assert launch.flags_for("client", flags) == ["--epochs", "2", "--no-freeze-base"]
    assert launch.central_flags(flags)[-1] == "imagenet"
    _, flags = launch.parse(["run", "--arch", "lite0", "--weights", "none"])
    assert launch.central_flags(flags)[-1] == "none"


def test_a_network_that_knows_photographs_gets_them_in_their_colours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs = ["run", "--dataset", "folder", "--source", "."]
    for more, expected in (
        (["--arch", "lite0"], "colour"),
        (["--arch", "lite0", "--preprocessing", "graham"], "graham"),
        ([], None),
        (["--arch", "vgg16"], None),
    ):
        _, flags = launch.parse([*photographs, *more])
        assert flags.get("--preprocessing") == expected
    assert "--preprocessing" not in launch.parse(["run", "--arch", "lite0"])[1]


def test_paths_are_relative_to_where_the_user_is(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "start.h5").touch()
    monkeypatch.chdir(tmp_path)
    given = ["run", "--dataset", "folder", "--source", "photos", "--weights", "start.h5"]
    _, flags = launch.parse(given)
    assert launch.flags_for("prepare", flags)[-1] == str(tmp_path / "photos")
    assert launch.flags_for("server", flags)[-1] == str(tmp_path / "start.h5")


WRONG = [
    (["--roundz", "3"], "unrecognized arguments: --roundz 3"),
    (["rounds"], "unrecognized arguments: rounds"),
    (["--rounds"], "--rounds: expected one argument"),
    (["--rounds", "x"], "'x' is not a whole number of at least 1"),
    (["--seed", "../../away"], "'../../away' is not a whole number of at least 0"),
    (["--dataset", "idrid"], "--dataset idrid needs --source"),
    (["--dataset", "idrid", "--source", "nowhere"], "there is no folder"),
    (["--source", "."], "--source without --dataset"),
    (["--weights", "nothing.h5"], "expected none, imagenet or a file; there is no"),
    (["--weights", "imagenet"], "are for --arch vgg16 and lite0"),
    (["--arch", "lite0", "--freeze-base", "--no-freeze-base"], "contradict each other"),
    (["--freeze-base"], "are for --arch vgg16 and lite0"),
    (["--preprocessing", "colour"], "--preprocessing is of photographs"),
    (["--balanced"], "--balanced is the thesis's draw from ddr, not from synthetic"),
]
WRONG_RUN = [
    (
        ["--split", "hospitals", "--dataset", "ddr", "--source", "."],
        "--split hospitals is of the drawn",
    ),
    (["--num-clients", "0"], "'0' is not a whole number of at least 1"),
    (["--split", "noniid", "--num-clients", "4"], "--split noniid is for 3 clients"),
]


@pytest.mark.parametrize(
    "command, flags, sentence",
    [("run_local.sh", *each) for each in WRONG + WRONG_RUN]
    + [("compare.sh", *each) for each in WRONG],
)
def test_wrong_usage_is_one_line_before_anything_is_installed(command, flags, sentence, tmp_path):
    copy_commands(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    shown = subprocess.run(
        ["bash", command, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert shown.returncode == 2 and shown.stdout == ""
    who = command.removesuffix(".sh")
    ending = rf"{who}: error: .*; \./{command} --help names the flags\n"
    assert re.fullmatch(DATE + ending, shown.stderr)
    assert sentence in shown.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["run_local.sh", "compare.sh", "test.sh", "make_certs.sh"])
def test_help_installs_nothing(command, tmp_path):
    copy_commands(tmp_path)
    shown = subprocess.run(
        ["bash", command, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0 and f"./{command}" in shown.stdout and shown.stderr == ""
    assert not (tmp_path / ".venv").exists()


def test_the_launcher_needs_no_package():
    shown = subprocess.run(
        [sys.executable, "-S", "-s", "launch.py", "run", "--rounds", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 2 and "at least 1" in shown.stderr, shown.stderr


def copy_commands(folder):
    """What stands in a fresh clone before anything was made, as far as a wrong flag meets it."""
    names = ["launch.py", "run_local.sh", "compare.sh", "test.sh", "setup.sh", "make_certs.sh"]
    for name in [*names, *(str(path.relative_to(ROOT)) for path in ROOT.glob("common/*.py"))]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
