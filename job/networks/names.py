"""The names of networks: torchvision's ResNets, timm/NAME, and package.module:function."""

import re

from job.declare import did_you_mean
from job.errors import RunError
from job.networks import timm_networks
from job.networks.resnet import ARCHS

OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
KINDS = "timm/NAME or package.module:function"


def is_own(arch: str) -> bool:
    """Return whether a name is a user's function."""
    return OWN.fullmatch(arch) is not None


def demands_size(arch: str) -> bool:
    """Return whether a network requires images of the size for which it was built."""
    is_timm = arch.startswith(timm_networks.PREFIX)
    return is_timm and timm_networks.configuration(arch).size > 0


def used_packages(arch: str) -> list[str]:
    """Return pip's names of the packages, except torch and torchvision, that build a network.

    The packages of a user's function are unknown.
    """
    return ["timm"] if arch.startswith(timm_networks.PREFIX) else []


def check_name(arch: str, shown: str) -> None:
    """RunError: the network does not exist. shown: its option.

    A user's function is not imported here.
    """
    if arch in ARCHS or is_own(arch):
        return
    if arch.startswith(timm_networks.PREFIX):
        timm_networks.check_name(arch, shown)
        return
    known = list(ARCHS)
    if near := did_you_mean(arch, known) or did_you_mean(arch, known + timm_networks.names()):
        raise RunError(f"{shown} {arch!r}{near.replace(';', ':', 1)}")
    raise RunError(f"{shown} {arch!r}: expected one of {', '.join(ARCHS)}, {KINDS}")
