"""Serving: many adapters on one frozen base, in one batch."""
