"""open_clip's models: load and save, image tower in parts, text tower by prefixes, zero-shot head."""
