"""Execution of the compiled kernels without a GPU, by `python -m ood_kernels.emulation`; excluded from the wheel."""
