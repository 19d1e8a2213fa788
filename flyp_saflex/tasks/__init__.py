"""Tasks, a training step's view of a model: inputs, label space, logits, parameters, save and load."""
