"""Models: a checkpoint's config, layers and weights, and the decoder that is made of them."""
