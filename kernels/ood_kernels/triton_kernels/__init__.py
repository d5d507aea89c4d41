"""Triton kernels, one family per file; `launch` selects tiles and launches, `device` holds shared device functions.

Imported on first launch, so that `import ood_kernels` needs neither Triton nor a GPU.
"""
