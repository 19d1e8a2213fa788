"""What a training step needs of a model: inputs, label space, logits, parameters, save and load."""
