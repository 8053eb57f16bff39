"""What made the results of this repository: runs from a checkout, is tested, and is not in the wheel."""
