"""What a checkpoint is: its config, its layers, its weights, and the decoder made of them."""
