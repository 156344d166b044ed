"""Maximum inner product search of query embeddings among label embeddings, and the label index on disk."""
