"""Model families: one file each, named as the `model_type` in `config.json`, from which it describes the layers."""
