"""Pages and what lies in them: the pool, the adapters on the device, their copies and their eviction."""
