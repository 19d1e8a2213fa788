"""Comparison of conditions: runs by seed, and a verdict in words on edits and on SAFLEX."""
