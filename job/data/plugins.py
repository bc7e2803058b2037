"""Formats that Pillow reads by plug-ins: HEIC and JPEG XL, with the extra `images`."""

import importlib
from collections.abc import Container

# Package: its module, and the endings that it reads.
PLUGINS = {
    "pillow-heif": ("pillow_heif", (".heic", ".heif", ".hif", ".heics", ".heifs")),
    "pillow-jxl-plugin": ("pillow_jxl", (".jxl",)),
}
ADVICE = "pip install '.[images]' for HEIC and JPEG XL"


def register() -> None:
    """Let Pillow read the formats of the plug-ins that are installed. It reads AVIF by itself."""
    for name, _ in PLUGINS.values():
        try:
            module = importlib.import_module(name)  # JPEG XL's registers itself
        except ImportError:
            continue
        if hasattr(module, "register_heif_opener"):
            module.register_heif_opener()


def advice(left_out: Container[str]) -> str:
    """Return the end of a line about files left out if a plug-in that is missing reads some.

    left_out: the endings of these files.
    """
    endings = [ending for _, endings in PLUGINS.values() for ending in endings]
    return f"; {ADVICE}" if any(ending in left_out for ending in endings) else ""
