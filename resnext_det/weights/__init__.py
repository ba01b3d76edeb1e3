"""Where a backbone's first weights come from, and the proof that they arrived."""
