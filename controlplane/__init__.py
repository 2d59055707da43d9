"""The control plane: requests, queues, adapter names and text. Never sees a page number or a tensor."""
