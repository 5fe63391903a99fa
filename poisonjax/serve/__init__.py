"""A small OpenAI-compatible server over our own batched generation, to try the guard with."""
