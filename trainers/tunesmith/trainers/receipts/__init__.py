"""Receipts: what rides in an artifact to show that it is what it says."""
