"""Files on disk, without torch: atomic writes, run folders, results, the augment cache."""
