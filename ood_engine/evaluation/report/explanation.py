"""Figure of an explanation: the image, and the contributions of its positions, classes and channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..explain import Explanation
from .drawing import BOLD, INK, SOFT_INK, new_panels, png, shortened, verbatim

__all__ = ["explanation_png", "largest"]

_TOWARDS_ID, _TOWARDS_OOD = "#2F6FB0", "#C8553D"


def largest(values: Tensor, count: int) -> list[tuple[int, float]]:
    """(index, value) of the entries of largest magnitude, in descending order."""
    order = values.abs().argsort(descending=True, stable=True)[:count]
    return [(int(index), float(values[index])) for index in order]


def explanation_png(
    pixels: Tensor, explanation: Explanation, classes: list[str] | None = None, count: int = 10
) -> bytes:
    """The explanation as a PNG of three panels (four with a feature map).

    Args:
        pixels: the image [C, H, W] to display, in [0, 1]; 1 or 3 channels.
        explanation: the explanation of this image.
        classes: names of the classes; None: their numbers.
        count: bars per panel.

    Raises:
        OodEngineError: matplotlib is not installed.
    """
    has_map = explanation.places is not None
    figure, axes = new_panels(1, 4 if has_map else 3, width=2.7, height=2.9)
    shown: Any = pixels.clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
    options = {"cmap": "gray", "vmin": 0, "vmax": 1} if pixels.shape[0] == 1 else {}
    panels = list(axes[0])
    panels[0].imshow(shown, **options)
    panels[0].set_title("image", **BOLD)
    if explanation.places is not None:
        places = F.interpolate(explanation.places[None, None], pixels.shape[1:], mode="bilinear")[0, 0].numpy()
        limit = float(np.abs(places).max()) or 1.0
        panels[1].imshow(shown if pixels.shape[0] == 1 else shown.mean(2), cmap="gray", vmin=0, vmax=1)
        panels[1].imshow(-places, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.6)
        panels[1].set_title("where", **BOLD)
    for panel in panels[: 2 if has_map else 1]:
        panel.set_xticks([])
        panel.set_yticks([])
    name = (lambda index: str(index)) if classes is None else (lambda index: shortened(classes[index], 14))
    _bars(panels[-2], "classes", [(name(index), value) for index, value in largest(explanation.classes, count)])
    _bars(panels[-1], "channels", [(str(index), value) for index, value in largest(explanation.channels, count)])
    title = f"{explanation.detector}: {explanation.score:.4g}, offset {explanation.offset:.4g}"
    verbatim(figure.suptitle(title, fontsize=9, color=SOFT_INK))
    figure.supxlabel(
        "contribution to the score: red towards out-of-distribution, blue towards in-distribution", fontsize=8
    )
    return png(figure)


def _bars(panel: Any, title: str, rows: list[tuple[str, float]]) -> None:
    labels, values = [label for label, _ in rows][::-1], [value for _, value in rows][::-1]
    panel.barh(range(len(rows)), values, color=[_TOWARDS_OOD if value < 0 else _TOWARDS_ID for value in values])
    panel.set_yticks(range(len(rows)))
    for text in panel.set_yticklabels(labels, fontsize=7):
        verbatim(text)
    panel.axvline(0, color=INK, linewidth=0.6)
    panel.set_title(title, **BOLD)
