"""Samples: inputs by name plus whatever a metric needs (labels, scores), in batches, in disjoint splits."""

from lamina.data.dataset import Dataset, Splits
from lamina.data.splitting import load_data, load_splits, overlap, split
from lamina.data.synthetic import synthetic

__all__ = ["Dataset", "Splits", "load_data", "load_splits", "overlap", "split", "synthetic"]
