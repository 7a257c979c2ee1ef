"""FLUX.2 Klein: a transformer that predicts a flow and sees earlier frames as they are.

transformer.py  in the form the frame engine steps
text.py vae.py  descriptions to vectors, pictures to latents
networks.py     how a pack of it lies in files
published.py    from a published checkpoint to a plan for adding it
"""
