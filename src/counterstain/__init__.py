"""Balance the rare subtypes of a tissue class with generated images, and prove that it helped."""
