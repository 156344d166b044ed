"""Mining: clusters of queries and labels, the order that they give, and label centroids."""
