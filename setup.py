"""Installs the packages as pyproject.toml describes them, and build_horovod.sh into the folder of their commands."""

from setuptools import setup

setup(scripts=["docker/build_horovod.sh"])
