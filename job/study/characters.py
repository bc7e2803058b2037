"""Capital letters drawn in the fonts of Debian's package fonts-aenigma."""

import string
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from job.errors import RunError

FONTS = Path("/usr/share/fonts/truetype/aenigma")
LETTERS = string.ascii_uppercase
SIDE, BOX = 32, 24  # pixels: the side of an image, and the larger side of its centred letter
EM = 96  # pixels: the size of the font before the letter is reduced


def draw_characters(log: Callable[[str], None]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (letter, font's file name, (SIDE, SIDE) uint8) for one font of each family.

    A family is the first word of the name in a font: Conduit for Conduit 2 Italics. Its fonts
    give almost the same images. A font is skipped if it is unreadable, if a letter is empty or in
    pieces (outlined, dotted, shaded), or if two letters are identical.
    RunError: the package is not installed.
    """
    files = sorted(FONTS.glob("*.ttf"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise RunError(
            f"characters: no fonts in {FONTS}; expected Debian's package. "
            "Run apt-get install fonts-aenigma"
        )
    families: set[str] = set()
    skipped = {"unreadable": 0, "with unsuitable letters": 0, "of the same family": 0}
    for path in files:
        try:
            font = ImageFont.truetype(str(path), EM)
            images = [draw(font, letter) for letter in LETTERS]
        except OSError:
            skipped["unreadable"] += 1
            continue
        family = (font.getname()[0] or path.stem).split()[0]
        connected = all(pieces(image) == 1 for image in images)
        if not connected or len({image.tobytes() for image in images}) < len(images):
            skipped["with unsuitable letters"] += 1
        elif family in families:
            skipped["of the same family"] += 1
        else:
            families.add(family)
            for letter, image in zip(LETTERS, images, strict=True):
                yield letter, path.name, image
    counts = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
    log(f"characters: {len(families)} fonts of {len(files)}; skipped: {counts}")


def draw(font: ImageFont.FreeTypeFont, letter: str) -> np.ndarray:
    """Draw a letter in black on white, (SIDE, SIDE) uint8."""
    left, top, right, bottom = map(round, font.getbbox(letter))
    canvas = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(canvas).text((-left, -top), letter, font=font, fill=255)
    glyph = canvas.crop(canvas.getbbox())
    width, height = (max(1, round(n * BOX / max(glyph.size))) for n in glyph.size)
    image = Image.new("L", (SIDE, SIDE))
    corner = ((SIDE - width) // 2, (SIDE - height) // 2)
    image.paste(glyph.resize((width, height), Image.Resampling.BOX), corner)
    return 255 - np.asarray(image)


def pieces(image: np.ndarray) -> int:
    """Return the number of connected regions of ink in an image, (H, W) uint8."""
    return cv2.connectedComponents((image < 128).astype(np.uint8))[0] - 1
