"""Networks and weights in: the registry, the from-scratch CNN, and where pretrained weights come from."""
