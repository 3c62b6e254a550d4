"""Generators of random content for the tasks: cue words, stories, keys and values, conversations, preferences, chains of thought."""
