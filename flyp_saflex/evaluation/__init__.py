"""Scores of trained models: predictions, metrics, weight averaging, statistics."""
