"""The comparison with SimSiam's released program."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.run
SCRIPT = Path(__file__).with_name("released.py")


def test_released_needs_a_clone(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith(f"CLONE {tmp_path}: no main_simsiam.py and simsiam/builder.py; ")
    assert line.endswith("expected a clone of https://github.com/facebookresearch/simsiam")
