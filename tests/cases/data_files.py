"""Files of rows as users have them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes the rows in the format that the name of `path` says; a CSV or Parquet file holds what its format can."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path
