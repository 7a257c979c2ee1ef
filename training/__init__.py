"""How Fabula's models are made: the procedural world, the loops and the evaluation. Nothing that serves imports it."""
