"""Demo of the whole method on synthetic camera-trap images: drawing, dataset, editing, training and report."""
