"""Other libraries' names and signatures over this engine: ``fastweights.compat.fla``."""
