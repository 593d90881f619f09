"""An adapter's folder in, another out."""
