"""The data sets of the regression recipe: reading them, and splitting them for one repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from arguments import option, require
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class DataOptions:
    _argument_group_name: ClassVar[str] = "the data"

    dataset: Literal["co2", "airline", "housing", "concrete", "parkinsons", "other"] = option(
        "co2", "decides heads and exponents; all but co2 and airline need --file"
    )
    file: str | None = option(None, "CSV file with a line of column names, all columns numbers")
    target: str | None = option(None, "column to predict; without it the last one")
    ignore: list[str] = field(
        default_factory=list, metadata={"help": "columns that are neither inputs nor the target"}
    )
    unit: str = option("", "unit of the target, for table and picture")

    def __post_init__(self) -> None:
        shipped = self.dataset in _PACKAGED
        require(
            (self.file is None) if self.dataset == "co2" else shipped or self.file is not None,
            "--file must name a CSV file, unless --dataset is co2, which comes with statsmodels, or "
            f"airline, which comes with sktime; got --dataset {self.dataset} and --file {self.file}.",
        )
        require(
            self.file is not None or not (self.target or self.ignore or self.unit),
            "--target, --ignore and --unit describe a --file, and there is none.",
        )


@dataclass(frozen=True)
class Points:
    """A data set: `inputs` (points, columns) and `target` (points,), in their own units."""

    inputs: NDArray[np.float64]
    target: NDArray[np.float64]
    columns: Sequence[str]
    name: str
    unit: str
    description: str


def read_points(options: DataOptions) -> Points:
    """The data set asked for.

    Raises:
        ValueError: a file without the columns named, with other than numbers, or with gaps.
    """
    if options.file is None:
        return _PACKAGED[options.dataset]()
    table = pd.read_csv(options.file)
    unknown = sorted({*options.ignore, options.target or table.columns[-1]} - {*table.columns})
    require(
        not unknown,
        f"{options.file} has no column {', '.join(unknown)}; it has {', '.join(table.columns)}.",
    )
    table = table.drop(columns=options.ignore)
    target = options.target or table.columns[-1]
    words = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    require(
        not words,
        f"{options.file}: column {', '.join(words)} holds other than numbers; convert it, or name "
        "it in --ignore.",
    )
    gaps = [name for name in table if not np.isfinite(table[name]).all()]
    require(not gaps, f"{options.file}: column {', '.join(gaps)} has gaps; fill or drop them.")
    inputs = table.drop(columns=target)
    require(
        len(table) >= 20 and inputs.shape[1] > 0,
        f"{options.file} must have at least 20 rows and a column beside the target {target}.",
    )
    return Points(
        inputs.to_numpy(np.float64),
        table[target].to_numpy(np.float64),
        list(inputs.columns),
        options.dataset if options.dataset != "other" else Path(options.file).stem,
        options.unit,
        f"{len(table)} rows of a CSV file: {target} from {', '.join(inputs.columns)}.",
    )


def co2() -> Points:
    """Monthly means of the atmospheric CO₂ at Mauna Loa; months without a sample are left out."""
    # Only this data set needs statsmodels.
    from statsmodels.datasets import co2 as mauna_loa

    months = mauna_loa.load_pandas().data["co2"].resample("MS").mean().dropna()
    years = months.index.year + (months.index.month - 0.5) / 12
    return Points(
        years.to_numpy(np.float64)[:, None],
        months.to_numpy(np.float64),
        ["year"],
        "co2",
        "ppm",
        f"{len(months)} monthly means of the atmospheric CO₂ at Mauna Loa, 1958 to 2001, from the "
        "flask samples of C. D. Keeling and T. P. Whorf (CDIAC), in statsmodels.",
    )


def airline() -> Points:
    """Monthly totals of international airline passengers, 1949 to 1960."""
    # Only this data set needs sktime.
    from sktime.datasets import load_airline

    passengers = load_airline()
    years = passengers.index.year + (passengers.index.month - 0.5) / 12
    return Points(
        years.to_numpy(np.float64)[:, None],
        passengers.to_numpy(np.float64),
        ["year"],
        "airline",
        "thousand passengers",
        f"{len(passengers)} monthly totals of international airline passengers, 1949 to 1960, series G "
        "of G. E. P. Box and G. M. Jenkins, Time Series Analysis, 1976, in sktime.",
    )


#: Data sets that a package carries.
_PACKAGED = {"co2": co2, "airline": airline}


@dataclass(frozen=True)
class Split:
    """The points of one repeat, standardised.

    Attributes:
        inputs: (points, columns), mean 0 and deviation 1 over all points.
        target: (points,), mean 0 and deviation 1 over the training points.
        train: indices of the training points, in order.
        held_out: indices of the others, in random order.
        deviation: of the training targets, in the target's unit.
    """

    inputs: Tensor
    target: Tensor
    train: Tensor
    held_out: Tensor
    mean: float
    deviation: float

    @classmethod
    def draw(cls, points: Points, share: float, seed: int) -> Split:
        """A random split. At least two points are held out, one for each half."""
        count = len(points.target)
        order = np.random.default_rng(seed).permutation(count)
        size = min(max(round(share * count), 2), count - 2)
        held_out, train = order[:size], np.sort(order[size:])
        deviation = points.inputs.std(axis=0)
        # A constant column tells nothing, and stays constant.
        deviation[deviation == 0] = 1.0
        inputs = (points.inputs - points.inputs.mean(axis=0)) / deviation
        mean, spread = points.target[train].mean(), points.target[train].std()
        require(spread > 0, "the training targets are all equal: there is nothing to predict.")
        return cls(
            torch.from_numpy(inputs),
            torch.from_numpy((points.target - mean) / spread),
            torch.from_numpy(train),
            torch.from_numpy(held_out),
            float(mean),
            float(spread),
        )
