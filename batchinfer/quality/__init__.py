"""Measuring a model's quality: perplexity, and its divergence and errors by layer from a reference model."""
