"""Maximum inner product search of query embeddings over label embeddings."""
