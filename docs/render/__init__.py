"""Renders the generated pages of docs/; not part of the package."""
