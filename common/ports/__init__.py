"""What the mesh needs from the world, as typing.Protocol classes; `common.adapters` and `common.engine` fill them."""
