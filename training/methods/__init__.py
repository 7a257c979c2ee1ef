"""Ways to teach a pack somebody new: which parameters train, what a step's loss is, what the artefact is.

method.py             what they have in common: the ground they stand on, a step's batch, the interface
changes.py            small changes of a frozen UNet's layers, as the slots of the frame service add them
adam.py               Adam, each group of parameters with its own rate

epicevo.py            squared error, a discriminator's doubt, the distance to the network as it was
dreambooth.py         the whole UNet
custom_diffusion.py   keys and values of text attention, and a word
textual_inversion.py  a word
lora.py               low-rank changes of attention and feed-forward

registry.py           name → method
"""
