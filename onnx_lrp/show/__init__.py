"""Pictures of explanations: heat maps, overlays, grids, series and bars with numpy and Pillow; texts as HTML.

Every figure is a PIL image; `save` writes it. A text is a page of HTML, or lines for a terminal.
Red speaks for the explained score, blue against it.
"""

from onnx_lrp.show.canvas import enlarge, save
from onnx_lrp.show.captions import caption_figure, caption_grid, word_matrix
from onnx_lrp.show.charts import bars, series
from onnx_lrp.show.colormaps import CHANNELS
from onnx_lrp.show.colormaps import NAMES as COLORMAPS
from onnx_lrp.show.concepts import ConceptCell, ConceptRow, concept_sheet
from onnx_lrp.show.curves import curves
from onnx_lrp.show.figure import comparison_figure, explanation_figure, picture_of, stack
from onnx_lrp.show.heatmap import (
    blend,
    grid,
    masked,
    normalize,
    overlay,
    reduce_channels,
    render,
    side_by_side,
    triptych,
)
from onnx_lrp.show.html import text_page
from onnx_lrp.show.terminal import text_lines
from onnx_lrp.show.text import text_rows
from onnx_lrp.show.words import words_picture
from onnx_lrp.show.zscores import z_pixels, z_tokens

__all__ = [
    "CHANNELS",
    "COLORMAPS",
    "ConceptCell",
    "ConceptRow",
    "bars",
    "blend",
    "caption_figure",
    "caption_grid",
    "comparison_figure",
    "concept_sheet",
    "curves",
    "enlarge",
    "explanation_figure",
    "grid",
    "masked",
    "normalize",
    "overlay",
    "picture_of",
    "reduce_channels",
    "render",
    "save",
    "series",
    "side_by_side",
    "stack",
    "text_lines",
    "text_page",
    "text_rows",
    "triptych",
    "word_matrix",
    "words_picture",
    "z_pixels",
    "z_tokens",
]
