"""How far a model is from its reference: perplexity, divergence, errors by layer."""
