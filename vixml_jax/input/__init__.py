"""Model inputs made from prepared data sets: tokens, packed rows, training batches."""
