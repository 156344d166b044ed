"""Mining of batches and labels: clusters of queries and labels, the order of an epoch, and label centroids."""
