"""Pictures of attention and of training: matplotlib figures that need no display, and a page.

Every function but `attention_page`, which returns HTML, returns a `matplotlib.figure.Figure` that
no global state knows of; `save_figure` writes it. Importing this package does not import
matplotlib: drawing does.
"""

from qkv_jax.viz.block_map import block_map
from qkv_jax.viz.browser import AttentionView, PageTable, attention_page
from qkv_jax.viz.curves import loss_curve
from qkv_jax.viz.dots import Dots, dots_figure
from qkv_jax.viz.heatmap import attention_heatmap, heads_figure
from qkv_jax.viz.matrices import matrices_figure
from qkv_jax.viz.panels import Panel, lines_figure
from qkv_jax.viz.style import save_figure, visible

__all__ = [
    "AttentionView",
    "Dots",
    "PageTable",
    "Panel",
    "attention_heatmap",
    "attention_page",
    "block_map",
    "dots_figure",
    "heads_figure",
    "lines_figure",
    "loss_curve",
    "matrices_figure",
    "save_figure",
    "visible",
]
