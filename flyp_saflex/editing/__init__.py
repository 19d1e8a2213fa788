"""From edit texts to edited images in the augment cache, by diffusers pipelines."""
