"""CLIP models of open_clip: loading and saving, cut image tower, prefix-sharing text tower, zero-shot head."""
