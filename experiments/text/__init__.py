"""A small model of Python source text, for traces of prose and code: corpus and training."""
