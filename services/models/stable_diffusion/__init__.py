"""Stable Diffusion 1.x, 2.x, XL and their Turbo kin, as published.

networks.py     how a pack of one lies in files
unet.py text.py in the form the frame engine steps; descriptions to vectors
pack.py         what a checkpoint says of sampling, and what its authors recommend where no file says it
"""
