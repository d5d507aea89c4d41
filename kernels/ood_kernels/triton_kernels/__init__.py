"""The Triton kernels, one family a file; `launch` chooses their tiles and starts them, `device` holds what they share.

Imported only when a kernel is about to run, so that `import ood_kernels` needs neither Triton nor a GPU.
"""
