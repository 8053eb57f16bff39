"""Contract checks that anyone can run on a method of their own.

>>> from vidsieve.testing import parametrize_with_checks
>>> @parametrize_with_checks([MyMethod])
... def test_contract(method, check):
...     check(method)
"""

from typing import Any

from vidsieve.testing.checks import CHECKS, check_compressor, example, make_video, parametrize_with_checks
from vidsieve.testing.views import GivenView

__all__ = [
    "CHECKS",
    "GivenView",
    "check_compressor",
    "check_family",
    "example",
    "make_video",
    "parametrize_with_checks",
]


def __getattr__(name: str) -> Any:
    """Import `check_family` on first use: it needs transformers, the checks of methods do not."""
    if name != "check_family":
        raise AttributeError(f"module 'vidsieve.testing' has no attribute {name!r}")
    from vidsieve.testing.equivalence import check_family

    return check_family
