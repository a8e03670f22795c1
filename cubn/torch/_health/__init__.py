"""PyTorch models, as diagnosis and repair of running statistics see them."""
