"""Install the packages of pyproject.toml, and docker/build_horovod.sh as a command."""

from setuptools import setup

setup(scripts=["docker/build_horovod.sh"])
