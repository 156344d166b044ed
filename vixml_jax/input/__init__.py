"""From prepared data sets to what the model reads: tokens, features, packed batches."""
