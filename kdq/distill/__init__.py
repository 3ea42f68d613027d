"""How a student learns: pure losses, one file per method over them, and the recipe all of them share."""
