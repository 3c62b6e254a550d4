"""Reasoning-length toolkit: find why a reasoning model thinks too long or too short, change it, judge the change.

Modules by the step of the work that they are for:

- **model**: ``lm`` loads a model; ``sites`` and ``hooks`` know where things are in it; ``bridges`` hands it to other tools.
- **sample**: ``tasks`` has problems, ``generate`` samples rollouts, ``phases`` knows where a response thinks.
- **measure**: ``collect`` averages activations, ``directions`` and ``methods`` make directions and head scores of them.
- **change**: ``edits``, ``masks``, ``baselines``, ``vectors``, ``rewards`` and ``grpo``.
- **judge**: ``evaluate`` compares models, ``figures`` and ``report`` show it, ``board`` compares everything; ``jobs`` and
  ``cli`` are the commands.

Importing the package imports none of them; import what you need: ``from toolkit import lm, generate``.
"""

__version__ = "0.2.0.dev0"
