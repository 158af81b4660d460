"""Data to train on: dialogues as text, and their speech."""
