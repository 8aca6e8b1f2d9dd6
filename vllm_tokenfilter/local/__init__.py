"""What this machine has: the cache folder, the embedded model, settings files, and where a result came from."""
