"""The offline planner: which roles a number of workers should have, found by simulating few of the many choices."""
