"""Edited images in the augment cache: the command `generate` and its editors."""
