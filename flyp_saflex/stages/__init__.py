"""The commands, composed from the floors below; no stage imports another (floor 3)."""
