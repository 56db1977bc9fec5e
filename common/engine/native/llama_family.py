"""The architectures that the kernels can compute. Apart, because planning a worker's memory asks for them and loads no torch."""

FAMILY = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"})
