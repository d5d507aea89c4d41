"""The small classifier of the demo."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SmallCNN", "small_cnn"]


class SmallCNN(nn.Module):
    """A classifier of tiny grey images [N, 1, H, W]: three 3×3 convolutions with batch norm and ReLU, mean, linear head.

    Images are upsampled twofold first, so that 8×8 scans yield a feature map [N, 64, 8, 8].

    Args:
        classes: number of classes.
        seed: seed of the initial weights; the global random state is left untouched.
    """

    def __init__(self, classes: int = 8, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear"),
                *_block(1, 16),
                *_block(16, 32),
                nn.MaxPool2d(2),
                *_block(32, 64),
            )
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.flatten = nn.Flatten()
            self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        logits: Tensor = self.head(self.flatten(self.pool(self.body(images))))
        return logits


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def small_cnn() -> SmallCNN:
    """The demo's model with eight classes, for `--model ood_engine.demo:small_cnn`."""
    return SmallCNN()
