"""The fuzzer, short; at length: python3 tests/fuzz.py"""

import json
import subprocess
import sys

from conftest import ROOT


def test_two_thousand_damaged_inputs():
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz.py", "--inputs", "2000", "--seed", "7"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["inputs"] == 2000
