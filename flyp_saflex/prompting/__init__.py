"""From captions of the training images to edit texts."""
