"""The prefill service: a worker that computes prompts and hands their KV to decode workers."""
