"""The rows of a step are a pure function of seed and step, however they are shared."""

from collections import Counter

import pytest
import torch

from flyp_saflex.errors import DataError
from flyp_saflex.images.augmentation import augmentation
from flyp_saflex.images.decode import read_image
from flyp_saflex.records import Edit, Sample
from flyp_saflex.training.batches import BatchReader
from flyp_saflex.training.sampling import Plan, Stream, derived_seed


def samples(tiny_images_dir):
    paths = sorted(tiny_images_dir.rglob("*.png"))
    return [Sample(sample_id=str(n), item=path, label=n % 3) for n, path in enumerate(paths)]


def preprocess(image):
    import numpy as np

    return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1).float()


def plan(rows, **changes):
    return Plan(**({"seed": 1, "train": rows, "edits": None, "batch_size": 12, "num_augmented": 8} | changes))


def test_derived_seed_is_known_and_differs_by_every_part():
    assert derived_seed(0, "train", 1) == derived_seed(0, "train", 1)
    assert len({derived_seed(*parts) for parts in ((0, 1), (1, 0), ("01",), (0, 1, ""), (0, "1 "))}) == 5
    assert all(0 <= derived_seed(number) < 2**63 for number in range(100))


def test_a_stream_shows_every_row_once_per_round_and_any_part_can_be_asked_for():
    stream = Stream(7, seed=3)
    whole = stream.take(0, 21)
    assert all(sorted(whole[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert whole[:7] != whole[7:14]
    assert [Stream(7, seed=3).take(start, 1)[0] for start in range(21)] == whole
    assert Stream(7, seed=4).take(0, 21) != whole


def test_a_balanced_stream_draws_classes_equally_and_rows_of_a_class_in_turn():
    labels = [0] * 12 + [1] * 3 + [2] * 6
    drawn = Stream(len(labels), seed=0, labels=labels).take(0, 21)
    assert Counter(labels[row] for row in drawn) == {0: 7, 1: 7, 2: 7}
    counts = Counter(drawn)
    for label in (0, 1, 2):
        times = [counts[row] for row in range(21) if labels[row] == label]
        assert max(times) - min(times) <= 1


def test_processes_and_parts_share_a_step_without_overlap(tiny_images_dir):
    whole = plan(samples(tiny_images_dir))
    rows = whole.step(5)
    assert [row.kind for row in rows] == ["train"] * 12 + ["augmented"] * 8
    for processes, parts in ((1, 1), (2, 1), (1, 2), (2, 2)):
        shares = [whole.shard(5, rank, processes, part, parts) for rank in range(processes) for part in range(parts)]
        assert sorted(str(row) for share in shares for row in share) == sorted(map(str, rows))
        assert all([row.kind for row in share] == sorted((row.kind for row in share), reverse=True) for share in shares)


def test_a_part_holds_the_same_rows_for_every_number_of_processes(tiny_images_dir):
    whole = plan(samples(tiny_images_dir))
    for part in (0, 1):
        alone = whole.shard(2, 0, 1, part, 2)
        together = whole.shard(2, 0, 2, part, 2) + whole.shard(2, 1, 2, part, 2)
        assert sorted(map(str, alone)) == sorted(map(str, together))


def test_augmented_rows_without_a_cache_are_the_steps_own_images(tiny_images_dir):
    rows = plan(samples(tiny_images_dir), num_augmented=24).step(3)
    train, augmented = rows[:12], rows[12:]
    assert [row.index for row in augmented] == [row.index for row in train] * 2
    assert len({row.seed for row in rows}) == 36, "every row has random operations of its own"


def test_reading_again_gives_the_same_pixels(tiny_images_dir):
    rows = samples(tiny_images_dir)
    operations = [augmentation("randaugment", 16), augmentation("flip", 16)]
    first, again = (BatchReader(plan(rows).step, 4, rows, None, preprocess, on_augmented=operations) for _ in range(2))
    torch.rand(3)  # the global generator has no say
    assert torch.equal(first[2].inputs, again[2].inputs)
    assert (len(first), first[2].num_train, len(first[2].rows)) == (4, 12, 20)
    assert not torch.equal(first[2].inputs[:8], first[2].inputs[12:]), "augmented rows are changed"
    plain = torch.stack([preprocess(read_image(rows[i].path)) for i in first[2].indices[:12]])
    assert torch.equal(first[2].inputs[:12], plain), "training rows are not"


def test_an_unreadable_row_is_replaced_by_the_next_and_reported(tiny_images_dir):
    rows = samples(tiny_images_dir)
    reader = BatchReader(plan(rows).step, 4, rows, None, preprocess)
    broken = reader[1].rows[0].index
    rows[broken].path.write_bytes(b"no image")
    batch = reader[1]
    assert int(batch.indices[0]) == (broken + 1) % len(rows)
    assert {path for path, _ in batch.unreadable} == {str(rows[broken].path)}
    assert "cannot be decoded" in batch.unreadable[0][1]


def test_nothing_readable_is_an_error(tiny_images_dir):
    rows = samples(tiny_images_dir)[:4]
    for row in rows:
        row.path.unlink()
    with pytest.raises(DataError, match=r"the 3 images after it cannot be read either: check data\.root"):
        BatchReader(plan(rows, batch_size=2).step, 1, rows, None, preprocess)[0]


def test_edits_are_a_stream_of_their_own(tiny_images_dir):
    rows = samples(tiny_images_dir)
    edits = [Edit(aug_id=f"e{n}", path=row.path, source_id=row.sample_id, label=row.label) for n, row in enumerate(rows[:8])]
    first = plan(rows, edits=edits).step(0)
    assert sorted(row.index for row in first[12:]) == list(range(8))
    assert [row.index for row in first[:12]] == [row.index for row in plan(rows).step(0)[:12]]
