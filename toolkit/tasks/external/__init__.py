"""Problems from outside the toolkit: data sets of the model hub, data sets of reasoning-gym, and JSONL files."""
