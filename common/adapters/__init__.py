"""One module per outside library: NATS, Redis, UCX, sockets; and their in-memory twins."""
