"""What the engine hands back: scores by detector, and counts of what was not sound."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .errors import OodEngineWarning

__all__ = ["Scores"]


class Scores(dict[str, Tensor]):
    """Detector name → float32 [N], higher = more in-distribution; NaN for an input that gives no sound score.

    Attributes:
        bad_rows: 0-d int64 on the device of the scores: rows with a NaN in any score.
        clamped: detector name → 0-d int64: rows whose base score was not positive and was clamped (see `detectors.nap`).
    """

    def __init__(self, scores: dict[str, Tensor], clamped: dict[str, Tensor] | None = None) -> None:
        super().__init__(scores)
        self.clamped = clamped or {}
        bad = torch.stack([torch.isnan(score) for score in scores.values()]).any(0) if scores else torch.zeros(0)
        self.bad_rows = bad.sum()

    @classmethod
    def concatenate(cls, parts: list[Scores]) -> Scores:
        """The scores of several batches as one."""
        names = parts[0].keys()
        clamped = {name: torch.stack([part.clamped[name] for part in parts]).sum() for name in parts[0].clamped}
        return cls({name: torch.cat([part[name] for part in parts]) for name in names}, clamped)

    def cpu(self) -> Scores:
        """The same on the host."""
        clamped = {name: count.cpu() for name, count in self.clamped.items()}
        return Scores({name: score.cpu() for name, score in self.items()}, clamped)

    def report(self) -> None:
        """Warn, once the scores are on the host, about rows without a score and about clamped ones."""
        total = len(next(iter(self.values()))) if self else 0
        if int(self.bad_rows):
            warnings.warn(
                f"{int(self.bad_rows)} of {total} inputs have no score (NaN): their pixels or activations are NaN or infinite; look"
                " at those images",
                OodEngineWarning,
                stacklevel=3,
            )
        for name, count in self.clamped.items():
            if int(count):
                warnings.warn(
                    f"{name}: the base score of {int(count)} of {total} inputs is not positive and was clamped to 1e-6",
                    OodEngineWarning,
                    stacklevel=3,
                )
