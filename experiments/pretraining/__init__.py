"""How the shipped pretrained backbone was made."""
