"""Checkpoints with weights in few bits: one file a format, all read into one form of matrix."""
