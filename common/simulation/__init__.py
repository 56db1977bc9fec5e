"""Runs policy and protocol as they are, in virtual time."""
