"""Arithmetic on tensors: one operation per file. `x.py` is the plain reference, `x_triton.py` the kernel for GPUs."""
