"""The base model: its configuration, weights and forward pass over the page pool. Knows nothing of requests or adapters' names."""
