"""Which job starts where, which one saves and makes room, and why the others wait. Pure: nothing here knows Ray."""
