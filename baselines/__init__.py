"""Other sources of experience behind pgd.Generator: a world model, the log itself, a clone."""
