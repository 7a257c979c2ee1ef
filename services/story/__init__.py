"""The story service: the edge that clients talk to, and the orchestrator that makes a story frame by frame."""
