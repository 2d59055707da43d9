"""The gRPC side of the process: server, servicer and sessions."""
