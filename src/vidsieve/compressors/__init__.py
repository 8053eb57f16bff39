"""The methods: one file each, torch only."""
