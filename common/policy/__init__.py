"""Pure decisions: which block, which step, which worker. Time and randomness are arguments."""
