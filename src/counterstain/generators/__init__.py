"""Label mask -> image."""
