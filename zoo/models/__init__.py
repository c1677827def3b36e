"""Networks and weights in: the registry of models, the from-scratch CNN, and where pretrained weights come from."""
