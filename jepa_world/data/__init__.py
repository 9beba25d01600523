"""Readers, windows, normalisation and embedded samples."""
