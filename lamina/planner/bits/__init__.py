"""Who gets how many bits: allocators, each a strategy of its own and a seed of the search."""
