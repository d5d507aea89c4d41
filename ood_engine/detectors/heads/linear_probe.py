"""A linear probe on vectors [N, K], trained as in the code of arXiv 2310.17163, with optional ReAct or BATS clamping."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...features.fit_data import FitData
from .base import VectorHead

__all__ = ["LinearProbe"]

_BATCH = 128
_MOST_QUANTILE_VALUES = 2**27
_BLOCK_ROWS = 8192
_REACT_QUANTILE = 0.9
_HERE: Any = {"dtype": torch.float32, "device": "cpu"}


class LinearProbe(VectorHead):
    """BatchNorm → Linear classifier on vectors, scored by the Energy or MSP of its logits (arXiv 2310.17163).

    Trained as in the paper's code: cross-entropy, SGD with momentum 0.9, weight decay 5e-4, learning rate 0.1, 10 epochs. The
    batch size of 128 is our default; the paper gives none. Trained on the CPU, hence deterministic for a given seed on any device.

    After training, inputs of the probe may be clamped. "react" (arXiv 2111.12797) clips the late dimensions from above at the 0.9
    quantile of their training values (at most the first 2^27 of them), where the paper's code uses 0.9 and 0.7 of the test data;
    "bats" (arXiv 2210.04200) clamps every dimension to mean ± standard deviation of the batch norm, a width that is our default;
    the paper gives none.

    Args:
        score: "energy" or "msp".
        epochs: training epochs.
        clamp: "none", "react" or "bats".
        react_from: first dimension clipped by ReAct; the paper's code uses 10 on CIFAR, 950 on ImageNet.

    Attributes:
        accuracy: 0-d training accuracy of the probe; None before `fit`.

    Raises:
        InputError: settings that are unknown or out of range.
    """

    accuracy: Tensor | None

    def __init__(self, score: str = "energy", epochs: int = 10, *, clamp: str = "none", react_from: int = 10) -> None:
        super().__init__("weight", "bias", "lower", "upper", "accuracy")
        if score not in ("energy", "msp"):
            raise InputError(f"probe score {score!r}: expected 'energy' or 'msp'")
        if not isinstance(epochs, int) or epochs < 1:
            raise InputError(f"epochs={epochs!r}: expected a whole number of at least 1")
        if clamp not in ("none", "react", "bats"):
            raise InputError(f"probe clamp {clamp!r}: expected 'none', 'react' or 'bats'")
        if react_from < 0:
            raise InputError(f"react_from={react_from!r}: expected a dimension of at least 0")
        self.score = score
        self.epochs = epochs
        self._clamp, self._react_from = clamp, react_from

    def fit(self, x: Tensor, labels: Tensor, classes: int, seed: int = 0) -> None:
        """Train on x [m, K] with labels [m] in 0 … classes - 1.

        Raises:
            InputError: fewer than two samples.
        """
        if x.shape[0] < 2:
            raise InputError(
                f"a probe on {x.shape[0]} samples: expected at least 2 ID samples besides the anchors; fit on more"
            )
        # Inference tensors cannot be trained on; others are not copied, since they may be memory-mapped.
        x, labels = (part.clone() if part.is_inference() else part for part in (x.detach().float().cpu(), labels.cpu()))
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` would also seed the generators of other devices, which are not restored.
            torch.default_generator.manual_seed(seed)
            norm, linear = nn.BatchNorm1d(x.shape[1], **_HERE), nn.Linear(x.shape[1], classes, **_HERE)
            accuracy = _train(nn.Sequential(norm, linear), x, labels, self.epochs)
        # In evaluation mode the norm is affine, and folds into the linear layer.
        assert norm.running_var is not None
        assert norm.running_mean is not None
        deviation = (norm.running_var + norm.eps).sqrt()
        weight = linear.weight * (norm.weight / deviation)
        lower, upper = self._bounds(x, norm.running_mean, deviation)
        self.set_fitted(
            weight=weight,
            bias=linear.bias + linear.weight @ norm.bias - weight @ norm.running_mean,
            lower=lower,
            upper=upper,
            accuracy=torch.tensor(accuracy, **_HERE),
        )

    def _bounds(self, x: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper clamping bounds, [K] each."""
        if self._clamp == "bats":
            return mean - deviation, mean + deviation
        lower, upper = torch.full_like(mean, -torch.inf), torch.full_like(mean, torch.inf)
        late = x[: max(1, _MOST_QUANTILE_VALUES // x.shape[1]), self._react_from :]
        if self._clamp == "react" and late.numel():
            # `torch.quantile` is limited to 2^24 values.
            upper[self._react_from :] = late.flatten().kthvalue(max(1, round(_REACT_QUANTILE * late.numel()))).values
        return lower, upper

    def fit_samples(self, x: Tensor, data: FitData, index: Tensor) -> None:
        """Fit on the vectors x [m, K] of the ID samples at `index` and their labels."""
        self.fit(x, data.labels(index), data.head.weight.shape[0], data.seed)

    def forward(self, x: Tensor) -> Tensor:
        """[N] logsumexp or maximum softmax probability of the probe's logits."""
        weight = self.fitted("weight")
        x = torch.clamp(x.to(weight.dtype), self.fitted("lower"), self.fitted("upper"))
        logits = F.linear(x, weight, self.fitted("bias"))
        return logits.logsumexp(1) if self.score == "energy" else logits.softmax(1).amax(1)


def _train(probe: nn.Sequential, x: Tensor, labels: Tensor, epochs: int) -> float:
    """Train in place. Returns the training accuracy."""
    optimiser = torch.optim.SGD(probe.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        probe.train()
        for index in torch.randperm(len(x), device="cpu").split(_BATCH):
            if len(index) == 1:  # a batch norm cannot be trained on one sample
                continue
            optimiser.zero_grad()
            F.cross_entropy(probe(x[index]), labels[index]).backward()
            optimiser.step()
    return _accuracy(probe, x, labels)


@torch.no_grad()
def _accuracy(probe: nn.Sequential, x: Tensor, labels: Tensor) -> float:
    probe.eval()
    parts = zip(x.split(_BLOCK_ROWS), labels.split(_BLOCK_ROWS), strict=True)
    return sum(int((probe(part).argmax(1) == right).sum()) for part, right in parts) / len(x)
