"""The planner: what a run needs of memory, time and disk, before it starts."""
