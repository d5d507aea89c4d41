"""Kernels compiled ahead of time for GPUs that are not here, by `python -m ood_kernels.aot`; no part of the wheel."""
