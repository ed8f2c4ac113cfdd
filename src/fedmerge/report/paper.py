"""A picture made fit for a paper: text that can be read in a column, and what it shows above it.

Pictures are drawn elsewhere, for the page, where the words around them say what they show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGER = 1.25
"""Times the page's text: in a column of 3.3 inches, 9 points are still about 7."""


def for_paper(figure: Figure, caption: str) -> Figure:
    """Enlarge the text of `figure` and write `caption` above it, outside of its canvas.

    Names may then reach over the edge of the canvas, too: `drawing.save` makes room for all.
    """
    from matplotlib.text import Text

    for axes in figure.axes:
        for axis in (axes.get_xaxis(), axes.get_yaxis()):
            labels = axis.get_ticklabels()
            if labels:
                axis.set_tick_params(labelsize=LARGER * float(labels[0].get_fontsize()))
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.get_xaxis(), axes.get_yaxis())
        for label in axis.get_ticklabels()
    }
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in ticks:
            text.set_fontsize(LARGER * float(text.get_fontsize()))
    if caption:
        high = figure.get_size_inches()[1]
        figure.text(0.012, 1 + 0.06 / high, caption, va="bottom", fontsize=9 * LARGER)
    return figure
