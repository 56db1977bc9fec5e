"""The `segue` command and what it is made of; `segue` and `test` beside this file set everything up on first use."""
