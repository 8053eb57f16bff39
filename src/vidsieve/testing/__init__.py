"""Contract checks that anyone can run on a method of their own.

>>> from vidsieve.testing import parametrize_with_checks
>>> @parametrize_with_checks([MyMethod])
... def test_contract(method, check):
...     check(method)
"""

from vidsieve.testing.checks import CHECKS, check_compressor, example, make_video, parametrize_with_checks

__all__ = ["CHECKS", "check_compressor", "example", "make_video", "parametrize_with_checks"]
