"""Data of the NewEpisode protocol (Wang et al., ACM MM 2024): who is new, what is learned from and what is tested on.

records.py       clips, five-clip windows, a corpus of them
registry.py      the new characters: names, generic mentions, phrases; finding them in captions by rules
registries/      those that the paper names, as data to be completed
relabelling.py   generic mentions made clear: proposals by rule or by a model that sees, decided by a person
split.py         pretraining without anybody new, one lesson each, everything else to test on; the leak assertion
foreign.py       NumPy and pickle files of the published data sets, with nothing run that they hold
flintstones.py   FlintstonesSV's folder → corpus
pororo.py        PororoSV's folder → corpus
toon.py          two casts of the toon world in the same shape

The benchmark itself is `training.evaluation.newepisode`.
"""
