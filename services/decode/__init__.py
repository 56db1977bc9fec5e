"""The decode service: a worker that takes over prompts' KV and makes tokens; with `--role both`, a colocated worker."""
