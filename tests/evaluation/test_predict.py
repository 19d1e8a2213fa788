"""Prediction over batches: every image is decoded once, whatever the number of models."""

import torch

from flyp_saflex.evaluation.predict import predict


def test_predict_reads_every_batch_once_for_all_variants_and_bounds_what_it_holds():
    images = torch.arange(10.0).reshape(10, 1, 1, 1)
    reads, entered = [], []

    def batches():
        for start in range(0, 10, 3):
            reads.append(start)
            yield range(start, min(start + 3, 10)), images[start : start + 3]

    def variant(factor):
        def enter():
            entered.append(factor)
            return lambda batch: factor * batch.reshape(-1, 1)

        return enter

    positions, logits = predict([variant(1), variant(-2)], batches(), rows_at_once=5)
    assert positions.tolist() == list(range(10))
    assert torch.equal(logits[0].flatten(), torch.arange(10.0))
    assert torch.equal(logits[1].flatten(), -2 * torch.arange(10.0))
    assert reads == [0, 3, 6, 9], "decoded once"
    assert entered == [1, -2, 1, -2], "two collections: 6 images and 4"
    entered.clear()
    predict([variant(3)], batches())
    assert entered == [3], "one model stays in place"


def test_predict_without_images():
    positions, logits = predict([lambda: lambda batch: batch], [])
    assert len(positions) == 0
    assert logits[0].shape == (0, 0)
