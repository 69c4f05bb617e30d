"""The recipe: schema, reading, overrides and the record of what was read."""
