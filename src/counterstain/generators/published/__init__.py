"""Weights in the layouts that other projects publish, to and from our networks."""
