"""Characters of 20 writing systems, drawn in fonts of Debian's package fonts-noto-core."""

import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import ImageFont

from job.errors import RunError
from job.study.characters import EM, draw

FONTS = Path("/usr/share/fonts/truetype/noto")
# Each system has a font of its own with more than 120 letters or signs.
SYSTEMS = (
    "AnatolianHieroglyphs",
    "Arabic",
    "Bamum",
    "CanadianAboriginal",
    "Cherokee",
    "Coptic",
    "Cuneiform",
    "Duployan",
    "EgyptianHieroglyphs",
    "Ethiopic",
    "Georgian",
    "LinearA",
    "LinearB",
    "MendeKikakui",
    "Mongolian",
    "Myanmar",
    "Nushu",
    "SignWriting",
    "Vai",
    "Yi",
)
# Unicode's letters and signs: no accents, digits or punctuation.
CATEGORIES = {"Lo", "Ll", "Lu", "So"}


def draw_writing(
    most: int,
    order: Callable[[str], str],
    log: Callable[[str], None],
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (system, its character, image) for up to `most` characters of each system.

    Characters are named as "Yi a000", with their code point. order: the sort key of these names.
    Images: (SIDE, SIDE) uint8. A character is skipped if its image is empty, or identical to the
    image of an earlier character of the system.
    RunError: the package is not installed, or a font is damaged.
    """
    if not FONTS.is_dir():
        expected = "expected Debian's package. Run apt-get install fonts-noto-core"
        raise RunError(f"writing: no {FONTS}; {expected}")
    for system in SYSTEMS:
        path = FONTS / f"NotoSans{system}-Regular.ttf"
        try:
            font = ImageFont.truetype(str(path), EM)
            if (code_points := TTFont(path).getBestCmap()) is None:
                raise ValueError("the font has no Unicode characters")
        except Exception as error:  # fontTools raises many kinds
            fix = "Run apt-get --reinstall install fonts-noto-core"
            raise RunError(f"writing: {path}: {error}; expected a font. {fix}") from None
        names = {f"{system} {point:x}": chr(point) for point in code_points if fits(chr(point))}
        seen: set[bytes] = set()
        for name in sorted(names, key=order):
            if len(seen) == most:
                break
            image = draw(font, names[name])
            if image.min() < 255 and image.tobytes() not in seen:
                seen.add(image.tobytes())
                yield system, name, image
        log(f"writing: {system}, {len(seen)} of {len(names)} characters")


def fits(character: str) -> bool:
    """Return whether a character is a letter or sign, and not Latin."""
    latin = unicodedata.name(character, "LATIN").startswith("LATIN")
    return unicodedata.category(character) in CATEGORIES and not latin
