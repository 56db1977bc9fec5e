"""The members of the mesh as pure machines (sequence engine, worker, gateway): policy and protocol composed.

The services run them over real adapters; tests and the simulator run the very same code in memory and in virtual time.
"""
