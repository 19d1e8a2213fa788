"""Records: splits held as columns equal splits of samples."""

import dataclasses
from pathlib import Path

from flyp_saflex.records import Sample, Samples, Split


def columns(num: int = 6, *, captions: bool = True) -> Samples:
    rows = range(num)
    return Samples(
        Path("/pictures"),
        sample_ids=[f"a{row % 2}/{row}.jpg" for row in rows],
        labels=[row % 3 for row in rows],
        domains=[f"camera {row % 2}" for row in rows],
        groups=[f"class={row % 3}" for row in rows],
        captions=[None if row % 2 else f"picture {row}" for row in rows] if captions else None,
        sequences=[f"burst {row // 2}" for row in rows],
    )


def of(samples) -> Split:
    return Split(name="train", role="train", shift="id", samples=samples)


def test_columns_equal_the_samples_that_they_hold():
    rows = columns()
    samples = tuple(rows)
    assert samples[3] == Sample(
        sample_id="a1/3.jpg", item=Path("/pictures/a1/3.jpg"), label=0, domain="camera 1", group="class=0", sequence="burst 1"
    )
    assert (rows == samples, rows[-1], rows[4:1:-2], hash(rows)) == (True, samples[-1], samples[4:1:-2], hash(samples))
    assert rows != samples[1:]
    assert rows != (*samples[:5], samples[0])
    assert next(iter(columns(captions=False))).caption is None


def test_columns_hold_every_field_of_a_sample():
    """A field that is new in `Sample` and not in `Samples` would be lost without a word."""
    fields = {field.name for field in dataclasses.fields(Sample)}
    columns_of = {"sample_ids", "labels", "domains", "groups", "captions", "sequences", "boxes"}
    assert {f"{name}s" for name in fields - {"item", "box"}} | {"boxes"} == columns_of == set(Samples.__slots__) - {"root"}


def test_splits_of_columns_and_of_samples_say_the_same():
    one, two = of(columns()), of(tuple(columns()))
    assert one == two
    assert list(one.sample_ids) == list(two.sample_ids)
    assert list(one.labels) == list(two.labels)
    assert one.class_counts() == two.class_counts()
    assert list(one.files()) == list(two.files()) == [sample.path.as_posix() for sample in two.samples]
    assert one.keep({"a0/2.jpg", "a1/5.jpg", "b"}) == two.keep({"a0/2.jpg", "a1/5.jpg", "b"}) == (one.samples[2], one.samples[5])


def test_files_below_the_current_folder_and_the_root_are_named_as_pathlib_does():
    for root in (".", "/", "a/b"):
        rows = Samples(Path(root), sample_ids=["x/1.jpg", "2.jpg"], labels=[0, 0], domains=["", ""])
        assert list(of(rows).files()) == [sample.path.as_posix() for sample in rows]
    assert list(of((Sample(sample_id="0", item=0, label=0),)).files()) == [""]
