"""Scores of edited images by the filters of ALIA: the command `filter`."""
