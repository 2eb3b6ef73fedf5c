"""A small chain-of-thought model trained for kvsim: task, training, evaluation, weights."""
