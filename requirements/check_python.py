"""Refuse a Python that the lock files were not made for."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        f"requirements/*.txt are made for Python 3.11 to 3.13, this is {sys.version.split()[0]}: choose another with "
        "`make PYTHON=python3.13`, or change --python-version in the Makefile's target `lock` and run `make lock`"
    )
