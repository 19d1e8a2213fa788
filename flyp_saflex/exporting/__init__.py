"""Export of a run's model: open_clip, transformers, ONNX, with a model card, to a folder or to the Hub."""
