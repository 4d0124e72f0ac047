"""What the plots share: two inks, bare axes, and a small file that keeps its colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

INK, GRID = "#333333", "#e6e6e6"


def bare(axis: Any) -> None:
    """A light grid under what is drawn, and no frame above and to the right."""
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def save(figure: Figure, file: Path) -> None:
    """Writes the picture with 256 colours, a third of its size with all; an octree keeps those that few points have."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, optimize=True)
