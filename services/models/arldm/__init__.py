"""AR-LDM: Stable Diffusion that reads the story so far. Knows what `services.models` knows, and no other family.

model.py        the context of a frame, what hides, the loss
blip.py text.py its two encoders: a frame with its caption, a caption alone
unet.py         Stable Diffusion's, looking at a context of which each row may see a part
sampling.py     stories, frame after frame
reader.py       the family as the frame engine asks for texts, and how a pack of it lies in files
checkpoint.py   its weights on disk: the published names, our folder
published.py    from the published checkpoint to a pack
"""
