"""What has to be settled before the first test module is imported."""

from __future__ import annotations

import os

import torch

# Triton reads this once, at its first import, and other libraries import it too.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
