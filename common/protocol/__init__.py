"""Messages and the state machines that exchange them. Sans-I/O: events in, effects out."""
