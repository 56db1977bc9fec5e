"""HTTP: routing, limits, keys, event streams, the server."""
