"""Installs the packages as pyproject.toml describes them, and build_horovod.sh beside their commands."""

from setuptools import setup

setup(scripts=["docker/build_horovod.sh"])
