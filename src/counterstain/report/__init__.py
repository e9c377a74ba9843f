"""Figures and the page; reads results, trains nothing."""
