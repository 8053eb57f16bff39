"""Rows of files, for tests."""

from __future__ import annotations

from vidsieve.training.data.layouts import read_records


def rows_of(path, root=None):
    """Return the rows of a file without faults."""
    records = list(read_records(path, root))
    assert not any(record.fault for record in records)
    return [row for record in records for row in record.rows]
