"""Predictions of a run on images of any folder or table: classes, probabilities, features, likely label errors."""
