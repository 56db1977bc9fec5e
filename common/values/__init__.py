"""Immutable values that every other part speaks in. Nothing here does I/O or imports a tensor library."""
