"""The training loop: setup, batches, schedule, checkpoints, model selection, processes."""
