"""What the demo is made of: a world that is drawn, and the small models that look at it (floor 2)."""
