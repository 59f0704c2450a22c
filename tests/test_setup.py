"""setup.sh makes .venv once, and again where it no longer works. Needs no network."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

INSTALLING = "setup: installing requirements.txt into .venv (a minute or two)"
AGAIN = "setup: .venv was moved, or its Python is gone: making it again"


@pytest.fixture
def project(tmp_path):
    shutil.copy(ROOT / "setup.sh", tmp_path)
    (tmp_path / "requirements.txt").touch()
    return tmp_path


def set_up(folder, **options):
    return subprocess.run(
        ["bash", "setup.sh"],
        cwd=folder,
        capture_output=True,
        text=True,
        start_new_session=True,
        **options,
    )


def said(folder):
    """What it says; then pip's own first line names the folder that it was installed into."""
    shown = set_up(folder)
    assert shown.returncode == 0, shown.stderr
    pip = subprocess.run([folder / ".venv/bin/pip", "--version"], capture_output=True, text=True)
    assert str((folder / ".venv").resolve()) in pip.stdout
    return shown.stdout.splitlines()


def test_it_installs_once_and_again_after_a_move_or_without_its_python(project):
    assert said(project) == [INSTALLING]
    assert said(project) == []

    moved = project / "moved"
    moved.mkdir()
    for name in ("setup.sh", "requirements.txt", ".venv"):
        (project / name).rename(moved / name)
    assert said(moved) == [AGAIN, INSTALLING]

    shutil.copy(moved / "setup.sh", project)
    shutil.copy(moved / "requirements.txt", project)
    (project / ".venv").symlink_to(moved / ".venv")
    assert said(project) == []

    (moved / ".venv/bin/python").unlink()
    (moved / ".venv/bin/python").symlink_to("/nowhere/python3")
    assert said(moved) == [AGAIN, INSTALLING]


def test_another_python_or_another_requirement_installs_once_more(project):
    said(project)
    [stamp] = project.glob(".venv/.installed-*")
    other_python = stamp.read_text().replace("Python 3", "Python 2")
    for path, text in ((stamp, other_python), (project / "requirements.txt", "# nothing")):
        path.write_text(text)
        assert said(project) == [INSTALLING] and said(project) == []


TOO_NEW = f"""#!/bin/sh
[ "$1" = -V ] && exec echo Python 3.14.0
exec {sys.executable} -c 'import sys; sys.version_info = (3, 14); exec(sys.argv[2])' "$@"
"""


def test_a_python_without_tensorflow_is_refused_and_a_venv_of_another_is_used(project, tmp_path):
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(TOO_NEW)
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    shown = set_up(project, env=environment)
    assert shown.returncode == 1 and not (project / ".venv").exists()
    assert "python3 is Python 3.14.0, expected Python 3.11 to 3.13: install one" in shown.stderr
    subprocess.run([sys.executable, "-m", "venv", project / ".venv"], check=True)
    assert set_up(project, env=environment).stdout.splitlines() == [INSTALLING]


INTERRUPTED = """#!/usr/bin/env bash
trap '' INT
kill -INT 0
exit 1
"""


def test_ctrl_c_during_the_check_leaves_venv_as_it_is(project):
    """A Python that is interrupted while it starts ends with 1, as one that does not run."""
    python = project / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(INTERRUPTED)
    python.chmod(0o755)
    shown = set_up(project)
    assert shown.returncode == 130 and shown.stdout == ""
    assert python.read_text() == INTERRUPTED


def test_where_no_python_starts_venv_stays(project, tmp_path):
    """For want of memory, say; and the home of another Python is not asked for."""
    said(project)
    assert set_up(project, env={**os.environ, "PYTHONHOME": "/nowhere"}).stdout == ""
    for python in (project / ".venv/bin/python", tmp_path / "bin/python3"):
        python.parent.mkdir(exist_ok=True)
        python.unlink(missing_ok=True)
        python.write_text("#!/bin/sh\nexit 1\n")
        python.chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    shown = set_up(project, env={**os.environ, "PATH": path})
    assert shown.returncode == 1 and "setup: error: python3 is " in shown.stderr
    assert shown.stdout == "" and (project / ".venv/pyvenv.cfg").exists()


def test_what_pip_refuses_is_a_sentence_and_tried_again(project):
    (project / "requirements.txt").write_text("no such requirement !\n")
    for _ in range(2):
        shown = set_up(project)
        assert shown.returncode == 1
        assert "setup: error: pip could not install requirements.txt" in shown.stderr
