"""Problems from outside the toolkit: data sets of the Hugging Face hub, data sets of reasoning-gym, and JSONL files."""
