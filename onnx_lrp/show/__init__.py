"""Pictures of explanations, drawn with numpy and Pillow: heat maps, overlays, grids, series and bars.

Every figure is a PIL image; `save` writes it. Red speaks for the explained score, blue against it.
"""

from onnx_lrp.show.canvas import enlarge, save
from onnx_lrp.show.charts import bars, series
from onnx_lrp.show.colormaps import NAMES as COLORMAPS
from onnx_lrp.show.concepts import ConceptCell, ConceptRow, concept_sheet
from onnx_lrp.show.figure import comparison_figure, explanation_figure, picture_of, stack
from onnx_lrp.show.heatmap import grid, normalize, overlay, reduce_channels, render, side_by_side, triptych

__all__ = [
    "COLORMAPS",
    "ConceptCell",
    "ConceptRow",
    "bars",
    "comparison_figure",
    "concept_sheet",
    "enlarge",
    "explanation_figure",
    "grid",
    "normalize",
    "overlay",
    "picture_of",
    "reduce_channels",
    "render",
    "save",
    "series",
    "side_by_side",
    "stack",
    "triptych",
]
