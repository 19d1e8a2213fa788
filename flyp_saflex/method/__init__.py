"""The papers in tensors: no file, no device, nothing from data/ (floor 2)."""
