"""What goes wrong before a data plane serves, beyond its model and its pool."""


class DataPlaneError(Exception):
    """The configuration cannot be served as it stands; the message says what to change."""
