"""The step engine: model loading, paged attention, the step, sampling. The only package that imports torch."""
