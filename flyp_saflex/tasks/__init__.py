"""Tasks: inputs, label space, logits, parameters, save and load of a model in training."""
