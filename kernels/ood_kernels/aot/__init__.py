"""Ahead-of-time compilation for absent GPUs, by `python -m ood_kernels.aot`; excluded from the wheel."""
