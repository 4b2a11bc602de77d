"""Drawings as PNG, with Pillow (the extra ``plot``).

Pillow rather than matplotlib: it draws the same rectangles, lines and text in a tenth of the size and time,
and whoever has matplotlib has it too.
"""

from __future__ import annotations

import io
from typing import Any

from lamina.errors import OutputError
from lamina.report.drawing import PAPER, Drawing, Label, Line, Rect
from lamina.report.text import printable

# Pixels a point.
SCALE = 2
# Twice 16,384 points: beyond it an image is refused by many viewers.
MOST_PIXELS = 1 << 27


def available() -> bool:
    """Whether PNG can be written here."""
    try:
        from PIL import ImageFont

        ImageFont.load_default(size=12)
    except (ImportError, TypeError, OSError):  # absent; older than 10.1; built without FreeType
        return False
    return True


def png(drawing: Drawing) -> bytes:
    """The drawing as PNG, two pixels a point.

    Raises:
        OutputError: Pillow is missing, or the drawing is too large.
    """
    if not available():
        what = "PNG figures need Pillow 10.1 or newer, which is not installed"
        raise OutputError(what, advice="pip install 'lamina[plot]', or use the SVG files")
    from PIL import Image, ImageDraw

    width, height = round(drawing.width * SCALE), round(drawing.height * SCALE)
    if width * height > MOST_PIXELS:
        raise OutputError(f"'{drawing.title}' would be {width} x {height} pixels", advice="use the SVG file")
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    for item in drawing.items:
        if isinstance(item, Rect):
            left, top = round(item.x * SCALE), round(item.y * SCALE)
            right, bottom = round((item.x + item.width) * SCALE), round((item.y + item.height) * SCALE)
            if right > left and bottom > top:
                pen.rectangle((left, top, right - 1, bottom - 1), fill=item.fill)
        elif isinstance(item, Line):
            ends = tuple(v * SCALE for v in (item.x1, item.y1, item.x2, item.y2))
            pen.line(ends, fill=item.color, width=max(1, round(item.width * SCALE)))
        else:
            _write(image, pen, item)
    held = io.BytesIO()
    # 256 colours are enough for bars and text, and a third of the bytes
    image.quantize(256, dither=Image.Dither.NONE).save(held, "PNG", optimize=True)
    return held.getvalue()


def _write(image: Any, pen: Any, label: Label) -> None:
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(size=label.size * SCALE)
    side = {"start": "l", "middle": "m", "end": "r"}[label.anchor]
    text, stroke = printable(label.text), 0.5 if label.bold else 0
    place = (label.x * SCALE, label.y * SCALE)
    if not label.turned:
        pen.text(place, text, fill=label.color, font=font, anchor=f"{side}s", stroke_width=stroke)
        return
    ascent, descent = font.getmetrics()
    length = int(font.getlength(text)) + 2
    strip = Image.new("L", (length, ascent + descent), 0)
    ImageDraw.Draw(strip).text((0, ascent), text, fill=255, font=font, anchor="ls", stroke_width=stroke)
    strip = strip.rotate(90, expand=True)
    # turned by -90 degrees the text runs upwards: its start is at the bottom of the strip
    up = {"start": length, "middle": length / 2, "end": 0}[label.anchor]
    image.paste(label.color, (round(place[0] - ascent), round(place[1] - up)), strip)
