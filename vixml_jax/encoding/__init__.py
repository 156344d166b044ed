"""Packed items to pooled vectors: any number without dropout, or a batch with gradients."""
