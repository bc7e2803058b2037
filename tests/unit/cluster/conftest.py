"""Fixtures of tests of workers."""

import pytest

from job.cluster.task import LAUNCHERS


@pytest.fixture
def unlaunched(monkeypatch):
    """Remove the variables of all launchers."""
    for names in LAUNCHERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
