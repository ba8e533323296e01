"""Images beside their adversarial twins."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rampart.reports.drawing import Picture
from rampart.reports.style import MATPLOTLIB


def twins(images: np.ndarray, examples: np.ndarray, names: Sequence[str], found: Sequence[str]) -> Picture:
    """A column for each image [N, C, H, W] in [0, 1] and its adversarial example: the image under its name, the example
    under what it is found to be, and the difference, of each image alone enlarged until its largest change is black or
    white."""
    count = len(images)
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(max(1.35 * count, 3.2), 4.8))
    grid = figure.subplots(3, count, squeeze=False)
    difference = examples - images
    enlarged = 0.5 + difference / np.maximum(2 * np.abs(difference).max((1, 2, 3), keepdims=True), 1e-6)
    for row, (shown, titles) in enumerate(((images, names), (examples, found), (enlarged, None))):
        for column, axes in enumerate(grid[row]):
            picture = shown[column].transpose(1, 2, 0).clip(0, 1)
            axes.imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if titles is not None:
                axes.set_title(titles[column], size=8)
    for axes, name in zip(grid[:, 0], ("image", "adversarial", "difference, enlarged"), strict=True):
        axes.set_ylabel(name, size=8)
    return Picture(figure)
