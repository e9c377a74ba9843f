"""Image -> tissue class."""
