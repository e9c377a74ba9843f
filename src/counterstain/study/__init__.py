"""Arms x repeats over shared generators and synthetic sets."""
