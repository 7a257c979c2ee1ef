"""`make bench-frame`: the frame engine beside what else draws story frames, in one process, on the same requests."""
