"""Health of torch models: what needs torch."""
