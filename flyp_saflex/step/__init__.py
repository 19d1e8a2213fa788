"""One training step: the plain loss, its augmented rows, and three ways to spend less on it."""
