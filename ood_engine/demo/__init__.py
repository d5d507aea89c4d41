"""The demo: every detector on a small classifier of scanned digits."""

from .small_cnn import SmallCNN, small_cnn

__all__ = ["SmallCNN", "small_cnn"]
