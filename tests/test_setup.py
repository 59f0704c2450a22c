"""setup.sh makes .venv once, and again where it no longer works. Needs no network."""

import shutil
import subprocess

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

AGAIN = "setup: .venv was moved, or its Python is gone: making it again"


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(ROOT / "setup.sh", folder)
    (folder / "none.txt").touch()
    return folder


def set_up(folder):
    shown = subprocess.run(
        ["bash", "setup.sh", "none.txt"], cwd=folder, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.splitlines()


def pip_works(folder):
    """By the program's own first line, which names the folder that it was installed into."""
    shown = subprocess.run(
        [folder / ".venv" / "bin" / "pip", "--version"], capture_output=True, text=True
    )
    return str(folder) in shown.stdout


def test_it_installs_once_and_again_after_a_move_or_without_its_python(project):
    installing = "setup: installing none.txt into .venv (a minute or two)"
    assert set_up(project) == [installing] and pip_works(project)
    assert set_up(project) == []

    moved = project.with_name("moved")
    project.rename(moved)
    assert set_up(moved) == [AGAIN, installing] and pip_works(moved)

    copied = project.with_name("copied")
    shutil.copytree(moved, copied, symlinks=True)
    assert set_up(copied) == [AGAIN, installing] and pip_works(copied)
    assert set_up(moved) == []

    (moved / ".venv" / "bin" / "python").unlink()
    (moved / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    assert set_up(moved) == [AGAIN, installing] and pip_works(moved)


@pytest.mark.parametrize(
    "path, text", [(".venv/.installed-*", "Python 2.7, of another time"), ("none.txt", "# nothing")]
)
def test_another_python_or_another_requirement_installs_once_more(project, path, text):
    set_up(project)
    next(project.glob(path)).write_text(text)
    assert set_up(project) == ["setup: installing none.txt into .venv (a minute or two)"]
    assert set_up(project) == []


INTERRUPTED = """#!/usr/bin/env bash
trap '' INT
kill -INT 0
exit 1
"""


def test_ctrl_c_during_the_check_leaves_venv_as_it_is(project):
    """A Python that is interrupted while it starts ends with 1, as one that does not run."""
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(INTERRUPTED)
    python.chmod(0o755)
    command = ["bash", "setup.sh", "none.txt"]
    shown = subprocess.run(command, cwd=project, capture_output=True, start_new_session=True)
    assert shown.returncode == 130 and shown.stdout == b""
    assert python.read_text() == INTERRUPTED


def test_what_pip_refuses_is_a_sentence_and_tried_again(project):
    (project / "none.txt").write_text("no such requirement !\n")
    for _ in range(2):
        shown = subprocess.run(
            ["bash", "setup.sh", "none.txt"], cwd=project, capture_output=True, text=True
        )
        assert shown.returncode == 1
        assert "setup: error: pip could not install none.txt" in shown.stderr
