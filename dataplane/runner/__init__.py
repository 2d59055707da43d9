"""One step on the device: inputs up, model, tokens chosen and brought back."""
