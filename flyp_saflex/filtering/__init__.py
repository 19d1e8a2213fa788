"""Scores of edited images: the filters of ALIA."""
