"""Whether a port is right, where not and why. Imports conversion and what lies below it."""
