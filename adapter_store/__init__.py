"""Adapters as files and bytes: PEFT import and validation, the packed image, sources, the host cache."""
