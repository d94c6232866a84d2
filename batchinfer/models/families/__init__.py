"""Model families. Each has a file, named after its `model_type`, that describes the layers from `config.json`."""
