"""The demo: a small classifier of scanned digits, and every detector on it."""

from .small_cnn import SmallCNN, small_cnn

__all__ = ["SmallCNN", "small_cnn"]
