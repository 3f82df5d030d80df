"""Rich renderables of plans and records. Knows values, not engines."""
