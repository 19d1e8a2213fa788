"""Columns of a table as float features: imputed, scaled, one-hot; fitted to training rows alone.

Shapes: N rows, F encoded columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from flyp_saflex.data.tabular_file import RawTable
from flyp_saflex.data.text import listed
from flyp_saflex.errors import DataError

MIN_FREQUENCY, MAX_CATEGORIES = 10, 100
"""Categories of fewer training rows, and all but the most frequent, share one column."""


@dataclass(frozen=True)
class Encoded:
    """Encoded rows.

    Attributes:
        rows_NF: float32.
        fields: field of the table that each column of `rows_NF` comes from.
        notes: what a person should know.
    """

    rows_NF: NDArray[np.float32]
    fields: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


def encode(table: RawTable, train: Sequence[int]) -> Encoded:
    """Encode all rows by what the training rows show.

    Numbers: the median for missing cells, then mean 0 and standard deviation 1. Categories: one-hot, rare and unseen ones
    together.

    Args:
        table: the cells.
        train: places of the training rows, at least one.

    Raises:
        DataError: no feature has a value in the training rows.
    """
    notes, at = [], np.asarray(train)
    numbers = {name: column for name, column in table.numbers.items() if not np.isnan(column[at]).all()}
    categories = {name: column for name, column in table.categories.items() if not pd.isna(column[at]).all()}
    if empty := [name for name in table.names if name not in numbers and name not in categories]:
        notes.append(f"{len(empty)} columns have no value in the training rows and are left out: {listed(empty)}")
    if not numbers and not categories:
        raise DataError("the table has no feature with a value in the training rows; correct the missing marks of the card")
    same = [name for name, column in numbers.items() if len(np.unique(column[at][~np.isnan(column[at])])) == 1]
    same += [name for name, column in categories.items() if len(set(column[at])) == 1]
    if same:
        notes.append(f"{len(same)} columns have one value in the training rows and tell nothing: {listed(same)}")
    # As numbers, which scikit-learn encodes many times faster than texts; missing cells are a category of their own.
    codes = {name: pd.factorize(column, use_na_sentinel=False)[0] for name, column in categories.items()}
    frame = pd.DataFrame(numbers | codes)
    for name, column in codes.items():
        if unseen := int((~np.isin(column, column[at])).sum()):
            notes.append(f"column '{name}': {unseen} rows have categories that no training row has; taken as rare ones")
    one_hot = OneHotEncoder(
        min_frequency=MIN_FREQUENCY,
        max_categories=MAX_CATEGORIES,
        handle_unknown="infrequent_if_exist",  # zeros where a column has no rare category
        sparse_output=False,
        dtype=np.float32,
        feature_name_combiner=lambda field, category: field,
    )
    parts = [("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), list(numbers))]
    parts += [("categories", one_hot, list(codes))]
    transformer = ColumnTransformer([part for part in parts if part[2]], sparse_threshold=0, verbose_feature_names_out=False).fit(
        frame.iloc[at]
    )
    rows_NF = np.ascontiguousarray(transformer.transform(frame), dtype=np.float32)
    fields = list(numbers)
    if codes:
        fields += transformer.named_transformers_["categories"].get_feature_names_out().tolist()
    assert len(fields) == rows_NF.shape[1], "every encoded column belongs to a field"
    return Encoded(rows_NF, tuple(fields), notes)
