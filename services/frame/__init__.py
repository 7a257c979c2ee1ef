"""The frame service: draws one picture from a description and the frames before it.

job.py         the nouns: what is asked for, what is told on the way, what comes out
sketch.py      checks a job and fills in what it leaves open
engine.py      one thread that draws many jobs at once, step by step
decoding.py    another one that decodes what is done, where the device works without the host
acceleration.py  what is faster on which device, and whether it is on
scheduler.py   who is taken, who begins, who steps together (pure)
adapters.py    characters' weights in memory, and which lie in the network
picture.py     reads references, writes frames
service.py     the RPCs and the Ray Serve application
server.py      the same RPCs in a process of its own (`python -m services.frame`)
loading.py     from settings to a warmed engine
config.py      its settings
metrics.py     what it counts and times
"""
