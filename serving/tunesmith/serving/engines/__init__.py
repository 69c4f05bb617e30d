"""What generates tokens, behind one protocol."""
