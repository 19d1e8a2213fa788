"""What the demo is made of: a world that is drawn, and the small models that look at it and change it (floor 2)."""

from pathlib import Path

TINY_CLIP = Path(__file__).with_name("tiny_clip")
"""A CLIP in open_clip's `local-dir:` layout."""
TINY_EDITOR = Path(__file__).with_name("tiny_editor")
"""An InstructPix2Pix in diffusers' layout, for `editor.model`."""
