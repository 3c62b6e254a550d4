"""Reasoning-length toolkit: find why a reasoning model thinks too long or too short, change it, judge the change.

Its modules, by step of the work:

- **model**: ``lm`` loads a model; ``sites`` and ``hooks`` know where things are in it; ``bridges`` hands it to other tools.
- **sample**: ``tasks`` has problems, ``generate`` samples rollouts, ``phases`` knows where a response thinks.
- **measure**: ``collect`` averages activations, ``directions`` and ``methods`` turn these into directions and head scores.
- **change**: ``edits`` changes weights, ``steering`` and ``masks`` change activations, ``baselines`` change decoding or the prompt,
  ``vectors`` saves steering vectors, ``rewards`` and ``grpo`` train.
- **judge**: ``evaluate`` compares models, ``figures`` and ``report`` show the comparison, ``board`` compares every kind of change;
  ``jobs`` and ``cli`` are the commands.

``import toolkit`` imports none of these modules; import the ones that you need: ``from toolkit import lm, generate``.
"""

__version__ = "0.2.0.dev0"
