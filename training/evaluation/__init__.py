"""How good a pack is: the judge that reads pictures, and the evaluation that uses it."""
