"""The gateway: everything between an HTTP client and the mesh. The only service that sees text; it holds no model."""
