"""Per-sample comparison of what the engine computes with the model's own head input and output."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .signals import Energies, wide

__all__ = ["Agreement", "OutputForm"]

OutputForm = Literal["logits", "softmax", "log_softmax"]
"""What the model returns."""

_MARGIN = 8.0
_LEAST = 1e-4
_LEAST_IN_HALF = 2e-2
_HALF = frozenset((torch.float16, torch.bfloat16))
_EXACT = ("ieee", "tf32x3")


class Agreement(NamedTuple):
    """Largest differences of the ID samples of `fit`, relative to the model's own values.

    Head and feature map are verified on one batch, but a clamp, a mask or a changed adapter can act on some samples only. Every
    later sample is therefore held to 8 times these differences, at least 1e-4, or 2e-2 in half precision; our defaults.

    Attributes:
        features: max |h - h'| over the features, with h' the model's own head input, relative to max |h'| of the sample or `scale`.
        logits: max of |lse - lse'| and |p - p'|, relative to max |z'| of the sample or 1; z' the model's own logits. Of a softmax
            only |p - p'|, relative to max |z| as far as p shows it: rounded logits move p by up to their own rounding.
        scale: mean over ID samples of max |h'|, below which a sample's own size does not count.
        output: what the model returns.

    Example:
        >>> own = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> agreement = Agreement.learn(own.clone(), own, None, None)
        >>> pooled = own + torch.tensor([[0.0, 0.0], [0.5, 0.0]])
        >>> agreement.feature_differences(pooled, own) <= agreement.allowed(pooled.dtype).features
        tensor([ True, False])
    """

    features: float = 0.0
    logits: float = 0.0
    scale: float = 0.0
    output: OutputForm = "logits"

    @classmethod
    def learn(cls, features: Tensor, head_input: Tensor, energies: Energies | None, output: Tensor | None) -> Agreement:
        """The agreement of the first samples, whose output form is that with the smallest difference."""
        scale = float(wide(head_input).abs().amax(1).mean())
        forms = [cls(scale=scale, output=form) for form in get_args(OutputForm)]
        if energies is None or output is None:
            return forms[0].widened(features, head_input, None, None)
        return min((one.widened(features, head_input, energies, output) for one in forms), key=lambda one: one.logits)

    def widened(
        self, features: Tensor, head_input: Tensor, energies: Energies | None, output: Tensor | None
    ) -> Agreement:
        """This agreement, including these samples."""
        worst = float(self.feature_differences(features, head_input).max())
        found = self._replace(features=max(self.features, worst))
        if energies is None or output is None:
            return found
        return found._replace(logits=max(self.logits, float(self.logit_differences(energies, output).max())))

    def feature_differences(self, features: Tensor, head_input: Tensor) -> Tensor:
        """[N] largest difference of each sample's pooled features from the head input, relative to its size."""
        own = wide(head_input)
        size = own.abs().amax(1).clamp(min=max(self.scale, torch.finfo(own.dtype).tiny))
        return (features - own).abs().amax(1) / size

    def logit_differences(self, energies: Energies, output: Tensor) -> Tensor:
        """[N] largest difference of each sample's energy and probabilities from those of the model's output."""
        lse, _, p = energies
        own = wide(output)
        if self.output == "logits":
            difference = torch.maximum((lse - own.logsumexp(1)).abs(), (p - own.softmax(1)).abs().amax(1))
            return difference / own.abs().amax(1).clamp(min=1)
        probabilities = own if self.output == "softmax" else own.exp()
        lowest = lse + p.amin(1).clamp(min=torch.finfo(p.dtype).tiny).log()
        return (p - probabilities).abs().amax(1) / torch.maximum(lse.abs(), lowest.abs()).clamp(min=1)

    def allowed(self, *dtypes: torch.dtype | None, precision: str = "ieee") -> Agreement:
        """Tolerances for values that were rounded to these dtypes, and operators of this precision."""
        least = _LEAST_IN_HALF if precision not in _EXACT or not _HALF.isdisjoint(dtypes) else _LEAST
        return self._replace(features=max(_MARGIN * self.features, least), logits=max(_MARGIN * self.logits, least))
