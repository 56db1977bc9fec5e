"""Settings, the service shell, the worker's shell, telemetry: the I/O around the pure machines."""
