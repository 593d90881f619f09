"""Cut a file of records into train.parquet and test.parquet, seeded, for studies on data without a
test part.

python studies/split.py ALPACA.parquet --rows 720 --test 120 --output runs/alpaca
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, help="how many records in all; default: every one")
    parser.add_argument("--test", type=int, default=200, help="how many of them are for testing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    table = pq.read_table(options.file)
    rows = options.rows or table.num_rows
    if not 0 < options.test < rows <= table.num_rows:
        sys.exit(
            f"error: {rows} records with {options.test} for testing, of {table.num_rows} in "
            f"{options.file}"
        )
    order = np.random.default_rng(options.seed).permutation(table.num_rows)[:rows]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", order[: options.test]), ("train", order[options.test :])):
        pq.write_table(table.take(part), options.output / f"{name}.parquet")
        print(f"{options.output / name}.parquet: {len(part):,} records")


if __name__ == "__main__":
    main()
