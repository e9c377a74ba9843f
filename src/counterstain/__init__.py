"""Balance the rare subtypes of a tissue class with generated images, and prove that it helped."""

__version__ = "0.1.0"
