"""What families of packs make of a lesson, so that no method knows which of them it teaches.

backbone.py    the interface: frames encoded once, rows of a step, what training hides, words that can be learned
storygen.py    earlier frames are passes of their own, which the UNet looks at
arldm.py       earlier frames are in the text, as BLIP tells them

registry.py    architecture → backbone
"""
