"""Quantized checkpoints: one file per format. All formats are read into one kind of matrix, `QuantizedMatrix`."""
