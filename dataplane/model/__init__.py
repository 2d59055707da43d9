"""The base model: configuration, weights and forward pass over the page pool. Knows nothing of requests."""
