"""The contracts of loraplane: protobuf sources, their generated stubs, and `planes`, the messages between the planes."""
