"""What the filter does to one text, token by token and layer by layer."""
