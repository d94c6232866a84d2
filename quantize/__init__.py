"""Making checkpoints in fewer bits: the walk through a model, the methods, the recipes."""
