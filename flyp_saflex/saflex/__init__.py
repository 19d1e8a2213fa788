"""SAFLEX on tensors: losses, gains, closed form and estimators, independent of models, files and trainer."""
