"""Making quantized checkpoints: the walk through a model's layers, the quantization methods, and the recipes."""
