"""SAFLEX in tensors: losses, gains, closed form, estimators; knows no model, no file and no trainer."""
