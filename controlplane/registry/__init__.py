"""The registry: which adapters exist, under which names and versions. Kept in Redis, copied in every control plane's memory."""
