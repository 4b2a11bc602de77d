"""Short text for tables and figures: numbers in units, names that fit and do no harm."""

from __future__ import annotations

from rich.cells import cell_len, chop_cells

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def printable(name: str) -> str:
    """The name with what a terminal would obey (escapes, line ends, direction marks) spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def shorten(name: str, width: int) -> str:
    """The name in at most ``width`` terminal cells, its middle left out: ends tell parts apart best."""
    name = printable(name)
    if cell_len(name) <= width:
        return name
    if width < 3:
        return "…"[:width]
    head = (width - 1) // 3
    tail = width - 1 - head
    front = chop_cells(name, head)[0] if head else ""
    back = chop_cells(name[::-1], tail)[0][::-1]
    return f"{front}…{back}"


def seconds(value: float | None) -> str:
    """``12.3 ms``; empty for None."""
    if value is None:
        return ""
    for limit, suffix in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= limit:
            return f"{_three(value / limit)} {suffix}"
    return f"{value * 1e9:.0f} ns"


def count(value: float) -> str:
    """``16.5 k``, ``6.72 M``."""
    for limit, suffix in _UNITS:
        if value >= limit:
            return f"{_three(value / limit)} {suffix}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """``12.3 MB``."""
    return f"{count(value)}B" if value >= 1e3 else f"{value:.0f} B"


def percent(share: float) -> str:
    """``12 %``; small shares are told apart from none and nearly all from all."""
    if 0 < share < 0.005:
        return "<1 %"
    return f"{100 * share:.0f} %"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def bar(share: float, width: int, *, plain: bool = False) -> str:
    """A bar of ``width`` cells, filled in eighths; ``plain`` for terminals without UTF-8."""
    share = min(max(share, 0.0), 1.0)
    if plain:
        return ("#" * round(share * width)).ljust(width)
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
