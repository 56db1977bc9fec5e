"""Token streaming over a websocket: several requests at once on one connection."""
