"""Subtypes that nobody annotated: instances described, clustered, and written as a cohort."""
