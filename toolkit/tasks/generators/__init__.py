"""Generators that the tasks use, of cue words, stories, keys and values, conversations, and chains of thought to train on."""
