"""The customization service: teaches a pack somebody new from one example story."""
