"""The console's files: plain modules, no build step, nothing from elsewhere."""
