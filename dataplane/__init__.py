"""The data plane: pages, weights, KV, streams, kernels and sampling. Knows no tenant, no policy and no text."""
