"""Datasets: a reader per layout, checks, splits, class names and caption templates."""
