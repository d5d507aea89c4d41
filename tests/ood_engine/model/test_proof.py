"""Models whose logits are not a function of the image alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ood_engine.errors import TapError
from ood_engine.model.tap import Tap


class Net(nn.Module):
    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.head, self.change = nn.Linear(6, 4), change

    def forward(self, x):
        return self.head(self.change(self, self.norm(self.conv(x))).mean((2, 3)))


CHANGES = {
    "dropout": (lambda m, x: F.dropout(x, 0.5), "two forward passes of the same images differ by up to .* F.dropout"),
    "noise": (lambda m, x: x + 0.1 * torch.randn_like(x), "two forward passes of the same images differ"),
    "batch mean": (
        lambda m, x: x - x.mean(0),
        "the logits of an image change by up to .* with the rest of its batch, such",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_logits_that_the_image_does_not_fix_are_refused(change):
    run, message = CHANGES[change]
    tap = Tap(Net(run))
    with pytest.raises(TapError, match=message):
        tap.find(torch.randn(6, 3, 8, 8))
    assert not tap.is_ready


def test_the_way_out_works():
    assert Tap(Net(lambda m, x: F.dropout(x, 0.5, m.training)).train()).find(torch.randn(6, 3, 8, 8)).proven


def test_batch_norm_without_statistics_is_named():
    model = Net(lambda m, x: x)
    model.norm = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(TapError, match="with the rest of its batch: 'norm' has no running statistics"):
        Tap(model).find(torch.randn(6, 3, 8, 8))
    model.norm = nn.BatchNorm2d(6)
    assert Tap(model).find(torch.randn(6, 3, 8, 8)).proven
