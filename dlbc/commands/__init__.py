"""The commands of `dlbc`, one file per group. Heavy imports stand inside the functions: `--help` must be quick."""
