"""GRPO with length rewards, on TRL."""
