"""Which objective and adaptation suit a data set, a base, a goal and a fleet: measured first, then decided by rules."""
