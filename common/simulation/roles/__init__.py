"""Roles that follow the load: the controller with the simulator in its loop, and the scenarios that it is judged by."""
