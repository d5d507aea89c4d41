"""Sequences, tokens, volumes and video: what is read as a channel and what as a position."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ood_engine as oe
from ood_engine.errors import TapError
from ood_engine.model.tap import Tap

WIDTH, CLASSES = 6, 4


class Net(nn.Module):
    """A stem, and a head on `factor` times the mean over all positions."""

    def __init__(self, stem, channels_last=False, factor=1, width=WIDTH):
        super().__init__()
        self.stem, self.factor, self.channels_last = stem, factor, channels_last
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        found = self.stem(x)
        return self.head(
            self.factor * (found.flatten(1, -2).mean(1) if self.channels_last else found.flatten(2).mean(2))
        )


class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(*self.dims)


def conv(dims, *layers):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return nn.Sequential(kind(3, WIDTH, 3, padding=1), nn.ReLU(), *layers)


STEMS = {
    "NDL": (lambda: conv(1), (10,), False),
    "NTD": (lambda: conv(1, Permute(0, 2, 1)), (10,), True),
    "NCHW": (lambda: conv(2), (4, 5), False),
    "NHWC": (lambda: conv(2, Permute(0, 2, 3, 1)), (4, 5), True),
    "NDTHW": (lambda: conv(3), (3, 4, 5), False),
    "NTHWD": (lambda: conv(3, Permute(0, 2, 3, 4, 1)), (3, 4, 5), True),
}


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("layout", STEMS)
def test_nap_of_every_layout_is_that_of_its_channels(layout, factor):
    make, size, last = STEMS[layout]
    torch.manual_seed(0)
    model, x = Net(make(), last, factor), torch.randn(40, 3, *size)
    engine = oe.Engine(model, ["nap"], feature_map=None if factor == 1 else "stem").fit([x])
    assert (engine.plan.layout, engine.plan.proven) == (layout, factor == 1)
    with torch.no_grad():
        found = model.stem(x)
        channels = (found.movedim(-1, 1) if last else found).flatten(2)
        expected = (channels.amax(2) / (channels.mean(2) + 1)).square().mean(1)
    torch.testing.assert_close(engine.score(x)["nap"], expected)


@pytest.mark.parametrize(("length", "width"), [(10, 60), (WIDTH, WIDTH)])
@pytest.mark.parametrize(("tail", "layout"), [((nn.MaxPool1d(1), nn.ReLU()), "NDL"), ((nn.LayerNorm,), "NTD")])
def test_where_the_width_of_the_head_does_not_tell_the_kind_of_the_layer_does(length, width, tail, layout):
    tail = (Permute(0, 2, 1), nn.LayerNorm(WIDTH), nn.ReLU()) if layout == "NTD" else tail
    model = nn.Sequential(
        conv(1, *tail), nn.Flatten(), nn.Linear(WIDTH * length, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )
    plan = Tap(model, feature_map="0").find(torch.randn(5, 3, length))
    assert (plan.layout, plan.proven) == (layout, False)


def test_a_layout_that_nothing_tells_is_refused_with_a_way_out():
    model = nn.Sequential(conv(1), nn.Flatten(), nn.Unflatten(1, (12, 5)), nn.Flatten(), nn.Linear(60, CLASSES))
    x = torch.randn(5, 3, 10)
    with pytest.raises(TapError, match=r"feature_map='2': its output can be read as \[N, T, D\] and as \[N, D, L\]"):
        Tap(model, feature_map="2").find(x)
    assert Tap(model, feature_map="0.0").find(x).layout == "NDL"


def test_other_maps_of_the_same_mean_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(conv(2), nn.AvgPool2d(2), Net(nn.Identity()))
    plan = Tap(model).find(torch.randn(5, 3, 4, 4))
    assert plan.feature_map == "2.stem"
    assert plan.reason.endswith(
        "; so is that of '0', '0.1', with other maxima: the last is taken, name another by feature_map=..."
    )
    assert Tap(model, feature_map="0").find(torch.randn(5, 3, 4, 4)).proven
