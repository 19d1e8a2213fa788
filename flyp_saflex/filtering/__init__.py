"""Scores of edited images by ALIA's filters and by source consistency: the command `filter`."""
