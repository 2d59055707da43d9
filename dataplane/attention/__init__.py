"""Attention over the page pool: the interface, its backends and the choice between them."""
