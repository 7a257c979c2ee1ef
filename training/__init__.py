"""How Fabula's models are made: the procedural world, the training loops and the evaluation. Nothing that serves imports it."""
