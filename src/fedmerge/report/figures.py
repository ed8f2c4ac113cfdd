"""The report's pictures: each function takes what was measured and returns a Figure.

They are drawn in `curves`, `dots`, `standings`, `heatmap`, `maps` and `split`; this is their door.
"""

from __future__ import annotations

from fedmerge.report.curves import gap_over_rounds, learning_curves
from fedmerge.report.dots import client_pairs, client_scatter, duel_intervals, method_dots
from fedmerge.report.drawing import Style, method_styles, save
from fedmerge.report.heatmap import importance_map, row_order, weights_heatmap
from fedmerge.report.maps import map_picture
from fedmerge.report.paper import for_paper
from fedmerge.report.split import LabelCounts, data_split
from fedmerge.report.standings import rank_picture, regret_picture
from fedmerge.report.svg import to_svg

__all__ = [
    "LabelCounts",
    "Style",
    "client_pairs",
    "client_scatter",
    "data_split",
    "duel_intervals",
    "for_paper",
    "gap_over_rounds",
    "importance_map",
    "learning_curves",
    "map_picture",
    "method_dots",
    "method_styles",
    "rank_picture",
    "regret_picture",
    "row_order",
    "save",
    "to_svg",
    "weights_heatmap",
]
