"""Reasoning-length toolkit: find why a reasoning model thinks too long or too short, change it, judge the change.

Importing the package is light: import the modules that you use, e.g. ``from toolkit import lm, generate``.
"""

__version__ = "0.1.0"
