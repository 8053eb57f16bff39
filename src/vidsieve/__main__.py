"""``python -m vidsieve``, and so ``torchrun … -m vidsieve``: the console script."""

from vidsieve.cli import main

main()
