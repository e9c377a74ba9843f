"""What comes in and what goes out: slides, annotations, tables, exports."""
