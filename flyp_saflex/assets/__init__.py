"""Small models shipped for the demo: a tiny CLIP and a tiny InstructPix2Pix editor."""

from pathlib import Path

TINY_CLIP = Path(__file__).with_name("tiny_clip")
"""Folder of a CLIP model in open_clip's `local-dir:` layout."""
TINY_EDITOR = Path(__file__).with_name("tiny_editor")
"""Folder of an InstructPix2Pix in diffusers' layout, for `editor.model`."""
