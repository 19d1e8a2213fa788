"""Edit texts from captions of the training images: the command `prompts`."""
