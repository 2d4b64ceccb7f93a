"""``persistrnn profile``: where the time and the memory of training on long sequences go."""
