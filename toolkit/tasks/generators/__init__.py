"""Generators that the tasks use: prompt words, stories, keys and values, conversations, and training traces."""
