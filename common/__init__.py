"""The shared house: values, policy, protocol, ports, simulation, mesh, adapters, engine, runtime."""
