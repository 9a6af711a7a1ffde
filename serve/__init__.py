"""Many requests over one batch: the scheduler that generate's batches are a client of, and the server."""
