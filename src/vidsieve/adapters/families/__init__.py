"""What each model family says of itself; one file a family."""
