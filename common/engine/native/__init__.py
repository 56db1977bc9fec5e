"""Own CPU kernels in C++, and the Llama family's forward on them: built once on this host, loaded with ctypes.

`build` makes the library, `library` calls it, `llama_model` takes a loaded model over, `native_forward` is its forward, and
`linear_modules` gives other architectures the same exact matrix products. `twins` says in plain torch what each kernel does.
"""
