"""Generators of random content for the tasks: cue words, stories, keys and values, conversations, and training chains of thought."""
