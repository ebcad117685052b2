"""What the values of config.yaml may be."""
