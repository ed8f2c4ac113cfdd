"""How a picture becomes inline SVG that follows the page's theme, and is short.

What is drawn, and in which colours, is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from typing import TYPE_CHECKING, Any

from fedmerge.report.drawing import INK, PALETTE, SURFACE, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_METADATA: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}


def to_svg(figure: Figure, label: str | None = None) -> str:
    """Return `figure` as an inline `<svg>` element that takes its colours from the page.

    Text and axes become `currentColor`, the palette becomes `var(--accent)` and so on, the ground
    is transparent and the font is the page's. Equal figures give equal bytes, and ids carry a
    prefix of their own so that several pictures can share a page. label: what a screen reader
    says; the figure's own label if None.
    """
    buffer = io.StringIO()
    with drawing():
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = buffer.getvalue()
    body = text[text.index("<svg") : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->|<style.*?</style>", "", body, flags=re.DOTALL)
    body = body[body.index(">") + 1 :]
    body = re.sub(r' id="(method|band|label)-(\d+)"', r' data-\1="\2"', body)
    body = re.sub(r' (?:d|x|y|transform)="[^"]*"', _rounded, body)
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', body))
    kept = {name for pair in used for name in pair if name}
    prefix = "f" + hashlib.sha256(body.encode()).hexdigest()[:8]
    short = {name: f"{prefix}-{number}" for number, name in enumerate(sorted(kept))}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{short[m[1]]}"' if m[1] in short else "", body)
    body = re.sub(r'(url\(#|href="#)([^)"]+)', lambda m: m[1] + short[m[2]], body)
    body = re.sub(r"font: (?:(bold) )?([\d.]+)px [^;\"]*", _page_font, body)
    body = re.sub(r"font-family: [^;\"]*(?:; |(?=\"))", "", body)
    body = _shared(_slimmed(body))
    for name, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{name})")
    body = body.replace(INK, "currentColor").replace(SURFACE, "var(--surface)")
    width, height = (72 * side for side in figure.get_size_inches())
    name = html.escape(label or str(figure.get_label()) or "figure")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="0 0 {width:g} {height:g}" stroke-linejoin="round" role="img"'
        f' aria-label="{name}">'
        f"<title>{name}</title>{body}</svg>\n"
    )


def _rounded(match: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point, those of long lines to a tenth: no eye can tell."""
    digits = 1 if len(match[0]) > 400 else 2

    def short(value: re.Match[str]) -> str:
        return f"{float(value[0]):.{digits}f}".rstrip("0").rstrip(".")

    return re.sub(rf"\d+\.\d{{{digits + 1},}}", short, match[0])


def _slimmed(body: str) -> str:
    """Drop groups without attributes, turns by nothing, and white space: two bytes of three."""
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body)
    body = re.sub(r"\s+", " ", body).replace("> <", "><")
    kept: list[str] = []
    bare: list[bool] = []
    for token in re.split(r"(<g(?: [^>]*)?>|</g>)", re.sub(r"<g ?/>", "", body)):
        if token == "</g>":
            if not bare.pop():
                kept.append(token)
        elif token.startswith("<g") and (token == "<g>" or token.startswith("<g ")):
            bare.append(token == "<g>")
            if token != "<g>":
                kept.append(token)
        else:
            kept.append(token)
    body = "".join(kept)
    body = re.sub(r' style="[^"]*"', lambda m: re.sub(r"([:;]) ", r"\1", m[0]), body)
    return re.sub(r' d="[^"]*"', lambda m: re.sub(r" ([LMCQz]) ", r"\1", m[0]), body)


def _shared(body: str) -> str:
    """Write what neighbours have in common, their style, once: in a group around them."""
    mark = r"<(?:path|use) [^>]*/>|<text [^>]*>[^<]*</text>"
    kept: list[str] = []
    run: list[str] = []
    style = ""

    def close() -> None:
        if len(run) > 1:
            bare = (part.replace(style, "", 1) for part in run)
            kept.append(f"<g{style}>{''.join(bare)}</g>")
        else:
            kept.extend(run)
        run.clear()

    for part in re.split(f"({mark})", body):
        found = re.search(r' style="[^"]*"', part) if re.fullmatch(mark, part) else None
        # The opacity of a group would be that of its picture, not that of each part.
        if part and (found is None or found[0] != style or re.search(r'["; ]opacity:', style)):
            close()
        if found is not None:
            style = found[0]
            run.append(part)
        else:
            kept.append(part)
    close()
    return "".join(kept)


def _page_font(match: re.Match[str]) -> str:
    weight = "font-weight: bold; " if match[1] else ""
    return f"{weight}font-size: {match[2]}px"
