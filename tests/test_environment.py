"""Where people run it: file systems without locks, and another project's Keras settings."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, fail_with

from common import files
from federation import weights


@pytest.mark.parametrize(
    ("fsync", "code", "words"),
    [
        (errno.EINVAL, 0, "warning: this file system cannot flush folders"),
        (errno.EIO, 1, "Input/output error"),  # that is a disk which fails
    ],
)
def test_without_locks_and_without_fsync_of_folders(
    client_main, served, monkeypatch, fsync, code, words
):
    """As on some network file systems."""
    no_locks = fail_with(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))

    def not_of_folders(fd, inner=os.fsync):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(fsync, os.strerror(fsync))
        inner(fd)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "fsync", not_of_folders)
    files._warn_once.cache_clear()
    ended, said = client_main("--server", served[1])
    assert ended == code and said.count(words) == 1 and "Traceback" not in said
    assert said.count("warning: this file system has no locks") == 1


@pytest.mark.parametrize(
    ("number", "words"),
    [
        # the system names no file where a write fails; whoever has to make room needs it
        (errno.ENOSPC, "No space left on device: 'client001/client_weights.h5'"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_a_client_without_room_or_open_files_ends_with_4_and_goes_on(
    client_main, served, monkeypatch, number, words
):
    """They may come back: its unit starts it again."""

    def write_half(path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(weights, "_write", write_half)
        code, said = client_main("--server", served[1])
    assert code == 4 and words in said
    assert not list(Path("client001").glob(".*.tmp*"))
    assert client_main("--server", served[1])[0] == 0


def test_keras_settings_of_another_project_are_not_ours(tmp_path):
    """They would change every number."""
    settings = {"floatx": "float16", "image_data_format": "channels_first", "epsilon": 0.1}
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text(json.dumps({"backend": "torch", **settings}))
    program = """
import model
model.configure(0)
from keras import backend, config
print(backend.backend(), config.floatx(), config.image_data_format(), config.epsilon())
"""
    environment = {**os.environ, "HOME": str(tmp_path), "KERAS_HOME": str(tmp_path / ".keras")}
    command = [sys.executable, "-c", program]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.stdout.split() == ["tensorflow", "float32", "channels_last", "1e-07"], shown.stderr
