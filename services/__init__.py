"""The services: one folder each, started as `python -m services.<name>`; they know each other only through messages."""
