"""Folders and files that hold a whole model: which file is which component, and its dimensions."""
