"""Contracts of the API, by version."""
