"""The standing set of requests and the step loop that computes it."""
