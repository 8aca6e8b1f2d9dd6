"""Which layers of a model look facts up far back (its retrieval layers), found once per model."""
