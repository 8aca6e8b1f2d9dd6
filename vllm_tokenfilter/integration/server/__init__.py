"""The API server's side: metrics and /token_filtering."""
