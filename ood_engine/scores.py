"""The result of scoring: scores by detector, with counts of non-finite and clamped ones."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .errors import OodEngineWarning

__all__ = ["Scores"]


class Scores(dict[str, Tensor]):
    """Detector name → float32 [N], higher = more in-distribution; NaN for an input without a finite score.

    Attributes:
        bad_rows: 0-d int64, on the device of the scores: number of rows with NaN in any score for another reason than the next.
        mismatched_rows: 0-d int64: number of rows that are NaN in every score because the engine's features or logits are not the
            model's own, see `features.agreement`.
        clamped: detector name → 0-d int64: number of rows with a non-positive, clamped base score (see `detectors.nap`).

    Example:
        >>> scores = Scores({"msp": torch.tensor([0.9, torch.nan]), "energy": torch.tensor([4.0, 1.0])})
        >>> scores["msp"], int(scores.bad_rows)
        (tensor([0.9000,    nan]), 1)
    """

    def __init__(
        self,
        scores: dict[str, Tensor],
        clamped: dict[str, Tensor] | None = None,
        mismatched_rows: Tensor | None = None,
    ) -> None:
        super().__init__(scores)
        self.clamped = clamped or {}
        bad = (
            torch.stack([torch.isnan(score) for score in scores.values()]).any(0)
            if scores
            else torch.zeros(0, device="cpu")
        )
        self.mismatched_rows = bad.new_zeros((), dtype=torch.int64) if mismatched_rows is None else mismatched_rows
        self.bad_rows = bad.sum() - self.mismatched_rows

    @classmethod
    def concatenate(cls, parts: list[Scores]) -> Scores:
        """Concatenated scores of several batches."""
        names = parts[0].keys()
        clamped = {name: torch.stack([part.clamped[name] for part in parts]).sum() for name in parts[0].clamped}
        mismatched = torch.stack([part.mismatched_rows for part in parts]).sum()
        return cls({name: torch.cat([part[name] for part in parts]) for name in names}, clamped, mismatched)

    def cpu(self) -> Scores:
        """A copy on the CPU."""
        clamped = {name: count.cpu() for name, count in self.clamped.items()}
        return Scores({name: score.cpu() for name, score in self.items()}, clamped, self.mismatched_rows.cpu())

    def report(self) -> None:
        """Warn of rows without a score and of clamped ones; synchronises with the device."""
        total = len(next(iter(self.values()))) if self else 0
        if int(self.bad_rows):
            warnings.warn(
                f"{int(self.bad_rows)} of {total} inputs have no score (NaN): their pixels or activations are NaN or infinite;"
                " check those images",
                OodEngineWarning,
                stacklevel=3,
            )
        if int(self.mismatched_rows):
            warnings.warn(
                f"{int(self.mismatched_rows)} of {total} inputs have no score (NaN): features or logits recomputed for them differ"
                " from the model's own, so that something acts on them that did not act on the images of fit, such as a clamp, a"
                " mask or an adapter; name another feature_map=..., choose detectors without a map, or fit again",
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
