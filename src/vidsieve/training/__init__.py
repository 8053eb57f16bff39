"""Training: sampling, rewards, advantages and losses as pure functions, and one readable loop per method."""
