"""Comparisons of runs as text, rows or a page: the command `report`."""
