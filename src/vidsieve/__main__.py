"""``python -m vidsieve``, and so ``torchrun … -m vidsieve``: the console script."""

from vidsieve.cli import main

if __name__ == "__main__":
    main()
