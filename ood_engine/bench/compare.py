"""Two runs of the benchmark held against each other: which rows, and which providers, differ beyond the noise.

Two runs of the same code differ by more than the rounds of one run do: the machine as a whole may be slower on that day, a slow
spell may hit one case and not the next, memory lies elsewhere, and where another program wants a core, the threads of a short
call wait for each other for milliseconds. So what a row is held to comes from both runs, from that which cannot have changed:

1. Ratios are new by old of the medians over rounds; e below is their natural logarithm. The median e over all copies of memory
   (one in every case with a known cost) is the drift of the machine.
2. A row is also held to its own case, whose providers ran in turns: to the median e of its copy and of the packages that are
   not ours, or where it has none, of its other providers. The effect of a row is what is nearest to nothing among e as it is, e
   less the drift once and twice, and e less that of its case once and twice; nothing where these disagree in sign. Twice, since
   a core that is slower by some factor for a copy is slower by another one for other work.
3. The scatter between the runs is the standard deviation of e about the median of its provider, over all rows, as far as half or
   three quarters of them show it, whichever is larger. A provider that was slowed as a whole does not widen it.
4. The disturbance of a row is the most milliseconds by which a row that is not ours, and takes at most twice as long, is away from
   the median ratio of its provider, beyond five scatters: what comes on top of short calls comes on top of longer ones too.
5. A row is faster or slower if its effect is at least a quarter; if it is above five scatters even at the end nearer to nothing
   of the 99 % bootstrap interval of e over the rounds of either run; and if it is more milliseconds than twice the
   disturbance.
6. A provider is faster or slower as a whole if the 99.9 % bootstrap interval of the median effect over at least eight of its
   rows is beyond a tenth.
7. Where other programs wanted the same cores (see `disturbance`) while a case was measured with several threads, its rows
   are disturbed, and neither judged nor counted in 3 and 6: every call may wait for a thread that another program keeps from
   running, a call of microseconds then takes many milliseconds, and nothing in the case itself may show that it did not always.

Copies only serve as controls. Tried on pairs of quick runs on two cores. Same code: no row and no provider called different, on
the idle machine and in 870 pairs with one thread beside other programs, nor by 1 to 6 alone in 42 pairs with two threads, where
single rows moved by up to 2000 ×. One provider doubled: seen in every pair but half of those last, on the idle machine also in
43 of its 59 rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .cases import OURS
from .limits import COPY
from .rows import KEY

__all__ = ["Comparison", "compare", "is_disturbed"]

Row = Mapping[str, Any]
Key = tuple[Any, ...]

LEAST_ROW, LEAST_PROVIDER = math.log(1.25), math.log(1.1)
SCATTERS, DISTURBANCES = 5.0, 2.0
DRAWS = 2000

_OF_THIS_PACKAGE = (OURS, "reference", "torch.compile")
_FACTS = ("device", "cpu", "cores", "gpu", "driver", "threads", "python", "torch", "triton", "commit", "effort")
_LEAST_RESIDUALS, _DEFAULT_SCATTER, _LEAST_SCATTER = 8, 0.1, 0.02
_LEAST_PROVIDER_ROWS = 8
_FEW_ROUNDS, _FEW_ROUNDS_HALF_WIDTH = 3, 0.2


class Comparison(NamedTuple):
    """What differs between two runs.

    Attributes:
        facts: in words, what differs before any row does: machine, versions, commit.
        rows: one a measurement that is in both, with the fields of `KEY` and old_ms, new_ms, ratio, low, high (99 % bootstrap
            interval of the ratio), effect (ratio that is left after the drift and its case), and verdict: "faster", "slower",
            "within noise", "disturbed", or "control" for a copy.
        providers: one a provider with enough rows: provider, rows, effect, low, high, verdict.
        only_old: measurements that the new run has not, in words.
        only_new: measurements that the old run has not.
        drift: ratio by which the machine itself was slower.
        scatter: ratio that what did not change differs by, typically.
        disturbance_ms: milliseconds by which something that cannot have changed moved.
        disturbed: share of the rows that are disturbed.
    """

    facts: list[str]
    rows: list[dict[str, Any]]
    providers: list[dict[str, Any]]
    only_old: list[str]
    only_new: list[str]
    drift: float
    scatter: float
    disturbance_ms: float
    disturbed: float

    @property
    def is_slower(self) -> bool:
        """Whether a row, or a provider as a whole, is slower beyond noise."""
        return any(row["verdict"] == "slower" for row in (*self.rows, *self.providers))


class _Timed(NamedTuple):
    rounds_ms: np.ndarray
    is_disturbed: bool


class _Pair(NamedTuple):
    key: Key
    old: np.ndarray
    new: np.ndarray
    is_disturbed: bool

    @property
    def provider(self) -> str:
        return str(self.key[KEY.index("provider")])

    @property
    def case(self) -> Key:
        return tuple(value for name, value in zip(KEY, self.key, strict=True) if name != "provider")

    @property
    def old_ms(self) -> float:
        return float(np.median(self.old))

    @property
    def new_ms(self) -> float:
        return float(np.median(self.new))

    @property
    def least_ms(self) -> float:
        return min(self.old_ms, self.new_ms)

    @property
    def log_ratio(self) -> float:
        return math.log(self.new_ms / self.old_ms)

    @property
    def is_foreign(self) -> bool:
        return not self.provider.startswith(_OF_THIS_PACKAGE)


def compare(old_document: Mapping[str, Any], new_document: Mapping[str, Any], seed: int = 0) -> Comparison:
    """Compare two documents of `ood_engine.bench.rows`; see the top of this file for what is beyond noise.

    Args:
        old_document: of the earlier run.
        new_document: of the later run.
        seed: of the bootstrap.
    """
    old, new = (_timed(document) for document in (old_document, new_document))
    pairs = [
        _Pair(key, old[key].rounds_ms, new[key].rounds_ms, old[key].is_disturbed or new[key].is_disturbed)
        for key in old
        if key in new
    ]
    calm = [pair for pair in pairs if not pair.is_disturbed]
    drift = _median([pair.log_ratio for pair in calm if pair.provider == COPY])
    providers: dict[str, list[float]] = defaultdict(list)
    for pair in calm:
        providers[pair.provider].append(pair.log_ratio)
    middles = {provider: float(np.median(values)) for provider, values in providers.items()}
    scatter, effects = _scatter(providers), _effects(pairs, drift)
    excess = [(pair.least_ms, _excess_ms(pair, middles[pair.provider], scatter)) for pair in calm if pair.is_foreign]
    generator = np.random.default_rng(seed)
    return Comparison(
        _differences(old_document, new_document),
        [_row(pair, effects[pair.key], scatter, excess, generator) for pair in pairs],
        _providers(calm, effects, generator),
        [_words(key) for key in old if key not in new],
        [_words(key) for key in new if key not in old],
        math.exp(drift or 0),
        math.exp(scatter),
        max((value for _, value in excess), default=0.0),
        1 - len(calm) / len(pairs) if pairs else 0.0,
    )


def _timed(document: Mapping[str, Any]) -> dict[Key, _Timed]:
    return {
        tuple(row[name] for name in KEY): _Timed(np.asarray(row["rounds_ms"]), is_disturbed(row))
        for row in document["rows"]
        if row["rounds_ms"]
    }


def is_disturbed(row: Row) -> bool:
    """Whether other programs wanted the cores on which the threads of this row ran; see 7."""
    return bool(row["disturbed"]) and (row["threads"] or 1) > 1


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _scatter(providers: Mapping[str, Sequence[float]]) -> float:
    distances = [
        abs(value - np.median(values)) for values in providers.values() if len(values) >= 3 for value in values
    ]
    if len(distances) < _LEAST_RESIDUALS:
        return _DEFAULT_SCATTER
    # Of normal numbers half are within 0.674 standard deviations, three quarters within 1.150.
    half, three_quarters = np.quantile(distances, [0.5, 0.75])
    return max(_LEAST_SCATTER, float(half) / 0.674, float(three_quarters) / 1.150)


def _excess_ms(pair: _Pair, middle: float, scatter: float) -> float:
    expected = pair.old_ms * math.exp(middle)
    return max(0.0, abs(pair.new_ms - expected) - SCATTERS * scatter * min(pair.new_ms, expected))


def _effects(pairs: Sequence[_Pair], drift: float | None) -> dict[Key, float]:
    cases: dict[Key, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        cases[pair.case].append(pair)
    effects = {}
    for pair in pairs:
        others = [other for other in cases[pair.case] if other is not pair]
        foreign = [other.log_ratio for other in others if other.is_foreign]
        local = _median(foreign or [other.log_ratio for other in others])
        controls = [control for control in (drift, local) if control is not None]
        left = [pair.log_ratio, *(pair.log_ratio - times * control for control in controls for times in (1, 2))]
        effects[pair.key] = min(left, key=abs) if min(left) > 0 or max(left) < 0 else 0.0
    return effects


def _row(
    pair: _Pair, effect: float, scatter: float, excess: Sequence[tuple[float, float]], generator: np.random.Generator
) -> dict[str, Any]:
    low, high = _interval(pair, generator)
    disturbance = max((value for least_ms, value in excess if least_ms <= 2 * pair.least_ms), default=0.0)
    moved_ms = pair.least_ms * math.expm1(abs(effect))
    # How far the effect reaches at the end of the interval that is nearer to nothing.
    certain = abs(effect) - (pair.log_ratio - low if effect > 0 else high - pair.log_ratio)
    is_beyond = abs(effect) > LEAST_ROW and certain > SCATTERS * scatter
    is_beyond &= moved_ms > DISTURBANCES * disturbance
    unjudged = "control" if pair.provider == COPY else "disturbed" if pair.is_disturbed else None
    return {
        **dict(zip(KEY, pair.key, strict=True)),
        "old_ms": pair.old_ms,
        "new_ms": pair.new_ms,
        "ratio": math.exp(pair.log_ratio),
        "low": math.exp(low),
        "high": math.exp(high),
        "effect": math.exp(effect),
        "verdict": unjudged or _verdict(effect, is_beyond),
    }


def _interval(pair: _Pair, generator: np.random.Generator) -> tuple[float, float]:
    """99 % bootstrap interval of the log ratio of medians; of few rounds at least what a single one is trusted with."""
    medians = [
        np.log(np.median(generator.choice(rounds, (DRAWS, len(rounds))), axis=1)) for rounds in (pair.new, pair.old)
    ]
    low, high = np.quantile(medians[0] - medians[1], [0.005, 0.995])
    if min(len(pair.new), len(pair.old)) < _FEW_ROUNDS:
        low = min(low, pair.log_ratio - _FEW_ROUNDS_HALF_WIDTH)
        high = max(high, pair.log_ratio + _FEW_ROUNDS_HALF_WIDTH)
    return float(low), float(high)


def _providers(
    pairs: Sequence[_Pair], effects: Mapping[Key, float], generator: np.random.Generator
) -> list[dict[str, Any]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        groups[pair.provider].append(effects[pair.key])
    found = []
    for provider, values in groups.items():
        if len(values) < _LEAST_PROVIDER_ROWS or provider == COPY:
            continue
        draws = np.median(generator.choice(values, (DRAWS, len(values))), axis=1)
        (low, high), middle = np.quantile(draws, [0.0005, 0.9995]), float(np.median(values))
        verdict = _verdict(middle, low > LEAST_PROVIDER or high < -LEAST_PROVIDER)
        bounds = {"effect": math.exp(middle), "low": math.exp(low), "high": math.exp(high)}
        found.append({"provider": provider, "rows": len(values), **bounds, "verdict": verdict})
    return found


def _verdict(effect: float, is_beyond: bool) -> str:
    return "within noise" if not is_beyond else "slower" if effect > 0 else "faster"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = old.get("machine", {}), new.get("machine", {})
    return [f"{name}: {before.get(name)} → {after.get(name)}" for name in _FACTS if before.get(name) != after.get(name)]


def _words(key: Key) -> str:
    return " ".join(str(part) for part in key if part)
