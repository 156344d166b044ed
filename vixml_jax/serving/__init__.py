"""HTTP server: one process with one model, which answers the requests of many clients in batches."""
