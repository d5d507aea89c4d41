"""OPNP, optimal parameter and neuron pruning (arXiv 2402.10062): energy of a head pruned of its extreme weights and neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, StateError
from ..features.fit_data import FitData
from ..features.signals import Signals
from ..runtime import Masks
from .base import Detector, register
from .nap import Combined

__all__ = ["NAPOPNP", "ONP", "OPNP", "OPP", "keep_mask", "sensitivity", "sensitivity_ranks"]

Range = Sequence[float]
_EVERYTHING = (0.0, 1.0)
_LOWER = (0.0, 0.05, 0.1, 0.2, 0.3)
_UPPER = (0.99, 0.995, 0.999, 1.0)


def sensitivity(data: FitData) -> Tensor:
    """M [C, D] = E|∂E/∂W|, the mean absolute gradient of the energy, in fp64.

    Closed form: ∂E/∂W_cj = -p_c h_j, so M = E[pᵀ|h|] is one matrix product.
    """
    total: Tensor | float = 0.0
    for signals in data.signals():
        total = total + signals.probabilities.double().T @ signals.features.double().abs()
    assert isinstance(total, Tensor)
    return total / len(data)


def sensitivity_ranks(values: Tensor) -> Tensor:
    """Number of strictly smaller entries, int32, same shape: any quantile range becomes a comparison of ranks."""
    flat = values.flatten().contiguous()
    return torch.searchsorted(flat.sort().values, flat).to(torch.int32).view(values.shape)


def keep_mask(ranks: Tensor, keep: Range) -> Tensor:
    """True where Q(ρ_min) ≤ M ≤ Q(ρ_max), with linear quantiles over all entries.

    With ρ_min > 0 entries equal to Q(ρ_min) are pruned too, such as the many equal zeros of dead neurons. In ranks: a value
    exceeds Q(ρ) iff more than floor(ρ(m - 1)) entries are smaller.
    """
    low, high = keep
    last = ranks.numel() - 1
    above = ranks > math.floor(low * last) if low > 0 else torch.ones_like(ranks, dtype=torch.bool)
    return above & (ranks <= math.floor(high * last))


@register("opnp")
class OPNP(Detector):
    """S = lse of the head with both weights and neurons pruned.

    The sensitivity of a weight is M_cj = E|∂E/∂W_cj|, that of a neuron the mean over its weights. Entries outside their quantile
    range are zeroed, without change of bias or rescaling (our reading). Class predictions remain those of the unpruned head.

    Args:
        weight_range: (ρ_min, ρ_max) in [0, 1], quantile range of weights to keep; our default. The paper selects it by grid
            search (`Engine.tune`), with values unknown to us.
        neuron_range: likewise for neurons.

    Raises:
        InputError: a range other than 0 ≤ ρ_min < ρ_max ≤ 1.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["opnp"]).fit([torch.rand(64, 1, 8, 8)])
        >>> weight_mask, neuron_mask = engine.detectors["opnp"].masks
        >>> weight_mask.shape, neuron_mask.shape
        (torch.Size([8, 64]), torch.Size([64]))
    """

    prunes = True
    _searched: ClassVar[tuple[str, ...]] = ("weight_range", "neuron_range")

    def __init__(self, *, weight_range: Range = (0.1, 0.995), neuron_range: Range = (0.05, 0.995)) -> None:
        super().__init__("weight_ranks", "neuron_ranks", "weight_mask", "neuron_mask")
        self._ranges = check_range("weight_range", weight_range), check_range("neuron_range", neuron_range)

    weight_mask: Tensor | None
    neuron_mask: Tensor | None

    @property
    def masks(self) -> Masks:
        """(weight mask bool [C, D], neuron mask bool [D]), True = keep."""
        return self.fitted("weight_mask"), self.fitted("neuron_mask")

    def fit(self, data: FitData) -> None:
        """Rank the sensitivities of the unpruned head and derive the masks."""
        weight_ranks, neuron_ranks = data.shared("sensitivity ranks", lambda: _ranks(data))
        self.set_fitted(weight_ranks=weight_ranks, neuron_ranks=neuron_ranks)
        self._update_masks()

    def forward(self, signals: Signals) -> Tensor:
        """[N] logsumexp of the pruned head."""
        return signals.pruned_lse(self)

    def grid(self) -> Sequence[dict[str, Any]]:
        """Lower ends 0 to 0.3 and upper ends 0.99 to 1, equal for weights and neurons, chosen here."""
        return [dict.fromkeys(self._searched, keep) for keep in product(_LOWER, _UPPER)]

    def configure(self, **settings: Any) -> None:
        """Change the ranges; the masks follow from the stored ranks."""
        weight_range = check_range("weight_range", settings.get("weight_range", self._ranges[0]))
        self._ranges = weight_range, check_range("neuron_range", settings.get("neuron_range", self._ranges[1]))
        if self.weight_mask is not None:
            self._update_masks()
        super().configure(**settings)

    def _update_masks(self) -> None:
        self.set_fitted(**self._masks_by_rank())

    def _masks_by_rank(self) -> dict[str, Tensor]:
        weight_range, neuron_range = self._ranges
        return {
            "weight_mask": keep_mask(self.fitted("weight_ranks"), weight_range),
            "neuron_mask": keep_mask(self.fitted("neuron_ranks"), neuron_range),
        }

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # A mask of one wrong bit moves scores by less than a canary tolerates.
        if self.is_fitted and not all(
            torch.equal(self.fitted(name), mask) for name, mask in self._masks_by_rank().items()
        ):
            raise StateError("the masks of its pruned head are not those of its ranks and ranges")


@register("opp")
class OPP(OPNP):
    """OPNP with weight pruning only.

    Args:
        weight_range: see `OPNP`.

    Raises:
        InputError: as `OPNP`.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["opp"]).fit([torch.rand(64, 1, 8, 8)])
        >>> engine.score(torch.rand(2, 1, 8, 8))["opp"].shape
        torch.Size([2])
    """

    _searched = ("weight_range",)

    def __init__(self, *, weight_range: Range = (0.1, 0.995)) -> None:
        super().__init__(weight_range=weight_range, neuron_range=_EVERYTHING)


@register("onp")
class ONP(OPNP):
    """OPNP with neuron pruning only.

    Args:
        neuron_range: see `OPNP`.

    Raises:
        InputError: as `OPNP`.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["onp"]).fit([torch.rand(64, 1, 8, 8)])
        >>> engine.score(torch.rand(2, 1, 8, 8))["onp"].shape
        torch.Size([2])
    """

    _searched = ("neuron_range",)

    def __init__(self, *, neuron_range: Range = (0.05, 0.995)) -> None:
        super().__init__(weight_range=_EVERYTHING, neuron_range=neuron_range)


@register("nap_opnp")
class NAPOPNP(Combined, OPNP):
    """NAP with OPNP: S = B^w · S_NAP^(1-w) with B = lse of the pruned head; a combination proposed here, in neither paper.

    Args:
        weight_range: see `OPNP`.
        neuron_range: see `OPNP`.
        eps: NAP constant, 1.0 in the paper.
        w: weight of the pruned energy; 0.5 is our default.

    Raises:
        InputError: as `OPNP` and `NAPEnergy`.

    Example:
        >>> import torch
        >>> from ood_engine import Engine
        >>> from ood_engine.demo import small_cnn
        >>> engine = Engine(small_cnn(), ["nap_opnp"]).fit([torch.rand(64, 1, 8, 8)])
        >>> engine.score(torch.rand(2, 1, 8, 8))["nap_opnp"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        *,
        weight_range: Range = (0.1, 0.995),
        neuron_range: Range = (0.05, 0.995),
        eps: float = 1.0,
        w: float = 0.5,
    ) -> None:
        super().__init__(eps=eps, w=w, weight_range=weight_range, neuron_range=neuron_range)

    def base(self, signals: Signals) -> Tensor:
        """[N] lse of the pruned head."""
        return signals.pruned_lse(self)


def _ranks(data: FitData) -> tuple[Tensor, Tensor]:
    values = sensitivity(data)
    return sensitivity_ranks(values), sensitivity_ranks(values.mean(0))


def check_range(name: str, keep: Range) -> tuple[float, float]:
    """Raise InputError unless keep is (ρ_min, ρ_max) with 0 ≤ ρ_min < ρ_max ≤ 1."""
    is_pair = isinstance(keep, Sequence) and len(keep) == 2 and all(isinstance(end, (int, float)) for end in keep)
    if not is_pair or not 0 <= keep[0] < keep[1] <= 1:
        raise InputError(f"{name}={keep!r}: expected two fractions with 0 ≤ lower < upper ≤ 1, such as (0.1, 0.995)")
    return float(keep[0]), float(keep[1])
