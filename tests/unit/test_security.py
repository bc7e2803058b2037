"""Input of a run must never run code."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from errors import refused
from job.config import read_config
from job.data.shards import INDEX, load_index
from job.errors import RunError

REPO = Path(__file__).parents[2]


def test_yaml_options_are_never_objects(write_yaml, tmp_path):
    harm = tmp_path / "harm"
    path = write_yaml(f"lr: !!python/object/apply:os.mkdir ['{harm}']\n")
    assert "not YAML" in refused(read_config, ["DIR", "--config", path])
    assert not harm.exists()


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_index_of_packed_images_is_never_objects(tmp_path):
    content = np.array([Harmful(tmp_path / "harm")], dtype=object)
    np.savez(tmp_path / INDEX, format=content)
    with pytest.raises(RunError, match="incomplete index"):
        load_index(str(tmp_path))
    assert not (tmp_path / "harm").exists()


def test_no_source_loads_pickles_or_runs_text():
    """Searches for the calls that are easiest to add by mistake."""
    calls = [
        r"(?<!FILE, )weights_only=False",  # a message names it
        r"allow_pickle=True",
        r"pickle\.loads?\(",
        r"yaml\.(?!safe_)\w*load\(",
        r"(?<![.\w])(eval|exec)\(",
    ]
    sources = [
        path for package in ("job", "mgd", "moco") for path in (REPO / package).rglob("*.py")
    ]
    assert len(sources) > 40
    assert [str(path) for path in sources if re.search("|".join(calls), path.read_text())] == []
