"""The gRPC front door: the public services, from message to message, and the server around them."""
