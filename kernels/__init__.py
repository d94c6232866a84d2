"""Arithmetic on tensors: one operation a file, the plain reference beside the fast path."""
