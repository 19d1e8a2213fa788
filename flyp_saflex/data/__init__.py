"""Readers and batches: they know files and no model (floor 2)."""
