"""lamina: a compiler for trained neural networks."""
