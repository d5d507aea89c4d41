"""Heads: detectors of a vector such as the gradient coordinates."""
