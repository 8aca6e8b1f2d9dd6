"""Which layers of a model recall, found once per model."""
