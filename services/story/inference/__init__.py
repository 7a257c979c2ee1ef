"""The Open Inference Protocol (KServe v2) at the edge: stock clients of it draw frames and write captions.

A translator: from `inference.*` messages to those of the frame and caption services, and back. `tensors.py` and
`parameters.py` read requests strictly, `catalog.py` says which models there are, `frame.py` and `caption.py` are the
two kinds of model, `stream.py` answers many requests of one stream, `servicer.py` is the RPCs.

The messages are those that `tritonclient` brings: a process cannot load a second copy of the package `inference`.
"""
