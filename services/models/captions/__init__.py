"""What writes captions and descriptions, how it is asked, and what is asked of its answers. Knows no engine.

llava.py        our captioner's shape and files
captioner.py    captioners that others published: kinds and sizes (published.py: how they become packs)
writers.py      those that vLLM does not serve, in plain transformers
wording.py      how a captioner is asked, and how what it says is read
prompts.py      what ours is asked, as token ids

cast.py         the name lock: whom a description may name, and how its names are mended
looks.py        the look lock: what those look like of whom the story has told
companions.py   the companion lock: somebody without a name keeps their looks
places.py       the place lock: where a description is whose caption says where
repetition.py   the repetition guard: captions that say again what was said
thread.py       the thread guard: captions that lose sight of the hero
invention.py    the invention guard: captions that make up somebody's name
"""
