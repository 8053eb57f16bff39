"""Published methods in the form in which they were published: whole matrices, loops where the releases loop.

What `benchmarks/selecting.py` measures ours against. They pass the recorded outputs of the official code
(`tests/test_plain.py`), and are used nowhere else.
"""
