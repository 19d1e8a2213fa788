"""From an image file to pixels to a tensor: decoding, preprocessing, random operations, loaders."""
