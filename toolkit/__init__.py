"""Reasoning-length toolkit: find out why a reasoning model thinks too long or too short, change it, and compare the result with the base.

Modules, by step of the work:

- **model**: ``lm`` loads a model. ``sites`` names its activations, ``hooks`` reads and changes them. ``bridges`` opens it in
  TransformerLens or nnsight.
- **sample**: ``tasks`` loads problems, ``generate`` samples rollouts, ``phases`` tells prompt, thinking and answer apart.
- **measure**: ``collect`` averages activations; ``directions`` and ``methods`` turn the averages into directions and head scores.
- **change**: ``edits`` changes weights, ``steering`` and ``masks`` change activations, ``baselines`` changes decoding or the prompt,
  ``rewards`` and ``grpo`` train. ``vectors`` exchanges steering vectors with other tools.
- **compare**: ``evaluate`` compares models, ``figures``, ``pages`` and ``report`` show the comparison, ``board`` compares all kinds of changes.
- **commands**: ``cli`` is the command line, ``jobs`` the functions behind it.

``import toolkit`` imports none of these modules. Import the ones that you need: ``from toolkit import lm, generate``.
"""

__version__ = "0.2.0.dev0"
